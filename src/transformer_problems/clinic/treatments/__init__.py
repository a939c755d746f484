"""Solutions that a trained checkpoint can have as it is: slug -> what applies it, loaded when it is asked for."""

TREATMENTS = {
    "kv-cache": "clinic.treatments.kv_cache:KVCacheOn",
    "quantization": "clinic.treatments.quantization:Quantization",
    "rope-scaling": "clinic.treatments.rope_scaling:RoPEScaling",
}
