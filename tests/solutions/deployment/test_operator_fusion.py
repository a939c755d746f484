"""Fused models answer and learn as the originals, launch fewer kernels, move fewer bytes, and come apart again."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import Chain, ModelTransform
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.lab.meters.kernels import count_kernels
from transformer_problems.models.block import FeedForward
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.attention.longformer import LongformerAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int8 import Int8Linear, QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.compression.smooth_quant import SmoothQuant
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning
from transformer_problems.solutions.deployment.compiled import CompileGraph
from transformer_problems.solutions.deployment.fused_feed_forward import FusedFeedForward, FuseFeedForward
from transformer_problems.solutions.deployment.fused_projections import FusedProjections, FuseProjections
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

# PyTorch's compiler looks for a gradient on every tensor that it meets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

TOKENS = torch.arange(14).view(2, 7) % 11
WIDTH = 16


def decoder(**options: object) -> Decoder:
    torch.manual_seed(0)
    rotary = RotaryEmbedding(4)
    return Decoder(11, WIDTH, 2, lambda: SelfAttention(WIDTH, 4, position=rotary, **options)).eval()


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(11, WIDTH, 2, lambda: SelfAttention(WIDTH, 4, is_causal=False, bias=True)).eval()


def vision() -> VisionTransformer:
    torch.manual_seed(0)
    patches = PatchEmbedding(patch_size=4, in_channels=1, embed_dim=WIDTH)
    return VisionTransformer(patches, (8, 8), 2, lambda: SelfAttention(WIDTH, 4, is_causal=False), 3).eval()


def llama() -> LlamaDecoder:
    torch.manual_seed(0)
    return LlamaDecoder(LlamaConfig(11, WIDTH, 2, 4, 32, num_kv_heads=2)).eval()


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(one: nn.Module, other: nn.Module, x: Tensor = TOKENS) -> None:
    """Outputs and gradients, up to the order of sums of some tens of float32 products of order one."""
    y, expected = one(x), other(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().mean().backward()
    expected.square().mean().backward()


FUSIONS = [FuseProjections(), FuseFeedForward(), Chain(FuseProjections(), FuseFeedForward())]


@pytest.mark.parametrize("fusion", FUSIONS, ids=repr)
@pytest.mark.parametrize(
    ("make", "x"),
    [(decoder, TOKENS), (encoder, TOKENS), (vision, torch.linspace(-1, 1, 128).view(2, 1, 8, 8))],
)
def test_fused_models_answer_and_learn_as_the_original(
    make: Callable[[], nn.Module], x: Tensor, fusion: ModelTransform
) -> None:
    model = make()
    before = copy.deepcopy(model)
    fused = fusion(model)
    assert equal_states(model, before)
    assert_same(fused, model, x)
    embedding = next(name for name, _ in model.named_parameters())
    torch.testing.assert_close(
        fused.get_parameter(embedding).grad, model.get_parameter(embedding).grad, rtol=1e-4, atol=1e-6
    )
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
        assert fused(x[:0]).shape == model(x[:0]).shape


def test_gradients_of_fused_projections_are_those_of_the_three() -> None:
    model = decoder(num_kv_heads=2, bias=True).double()
    fused = FuseProjections()(model)
    assert_same(fused, model)
    one, three = fused.body.blocks[0].mixer.qkv_proj, model.body.blocks[0].mixer
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(layer, name).grad for layer in (three.q_proj, three.k_proj, three.v_proj)])
        torch.testing.assert_close(getattr(one, name).grad, joined, rtol=1e-10, atol=1e-12)  # float64
    assert one.sizes == (16, 8, 8)


def test_gradients_of_fused_feed_forward_are_those_of_the_original() -> None:
    model = encoder().double()
    fused = FuseFeedForward()(model)
    assert_same(fused, model)
    ours = dict(fused.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-10, atol=1e-12)  # float64


@pytest.mark.parametrize("make", [decoder, lambda: decoder(num_kv_heads=2, bias=True), llama])
def test_streaming_a_fused_decoder_gives_the_whole_sequence(make: Callable[[], nn.Module]) -> None:
    model = make()
    fused = FuseProjections()(model)
    state, outputs = fused.initial_state(2), []
    with torch.no_grad():
        for chunk in TOKENS.split([1, 3, 0, 2, 1], dim=1):
            y, state = fused.stream(chunk, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), model(TOKENS), rtol=1e-5, atol=1e-5)


def test_fewer_kernels_launch_and_fewer_bytes_move() -> None:
    model, num_layers, num_tokens = encoder(), 2, TOKENS.numel()

    def step(net: nn.Module) -> Callable[[], None]:
        return lambda: net(TOKENS).sum().backward()

    with torch.no_grad():
        separate, joined = (count_kernels(lambda net=net: net(TOKENS)) for net in (model, FuseProjections()(model)))
    assert separate.kernels - joined.kernels == 2 * num_layers
    assert separate.bytes_read - joined.bytes_read == 2 * num_layers * 4 * num_tokens * WIDTH  # the input, twice less
    assert separate.bytes_written == joined.bytes_written
    for fusion in FUSIONS:
        before, after = count_kernels(step(model.train())), count_kernels(step(fusion(model).train()))
        assert after.kernels < before.kernels, fusion
        assert after.bytes_moved < before.bytes_moved, fusion


def test_undo_gives_back_the_very_model() -> None:
    model = decoder(num_kv_heads=2, bias=True)
    model.body.blocks[1].requires_grad_(False)
    for fusion in (FuseProjections(), FuseFeedForward()):
        fused = fusion(model)
        again = fusion.undo(fused)
        assert equal_states(again, model)
        assert [type(part) for part in again.modules()] == [type(part) for part in model.modules()]
        learning = [[p.requires_grad for p in net.parameters()] for net in (again, model)]
        assert learning[0] == learning[1]
        assert torch.equal(again(TOKENS), model(TOKENS))
        assert repr(again) == repr(model)
        assert not equal_states(fused, again) or isinstance(fusion, FuseFeedForward)
        with pytest.raises(ArgumentError, match="model must hold Fused.* to take apart"):
            fusion.undo(model)


@pytest.mark.parametrize("fusion", [*FUSIONS, CompileGraph(backend="eager")], ids=repr)
def test_saved_and_reloaded_models_answer_bit_by_bit(fusion: ModelTransform, tmp_path: Path) -> None:
    fused = fusion(encoder())
    save_treated(fused, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = Encoder(11, WIDTH, 2, lambda: SelfAttention(WIDTH, 4, is_causal=False, bias=True)).eval()
    reloaded = load_treated(tmp_path / "model.safetensors", other, fusion)
    assert equal_states(reloaded, fused)
    assert torch.equal(reloaded(TOKENS), fused(TOKENS))


def test_a_network_of_the_same_form_that_computes_something_else_stays() -> None:
    class Pair(nn.Module):
        def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
            self.activation = activation
            nn.init.zeros_(self.down.weight)  # as residual layers may start: their answer tells nothing

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.activation(self.up(x)))

    def approximate(x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")

    for activation in (torch.relu, approximate, nn.functional.silu):
        with pytest.raises(ArgumentError, match=r"computes down\(gelu\(up\(x\)\)\); 0, a Pair, is skipped or computes"):
            FuseFeedForward()(nn.Sequential(Pair(activation)))
    both = FuseFeedForward()(nn.Sequential(Pair(torch.relu), Pair(nn.functional.gelu)))
    assert isinstance(both[0], Pair) and isinstance(both[1], FusedFeedForward)
    assert isinstance(FuseFeedForward()(FeedForward(8)), FusedFeedForward)


def test_the_inner_layer_is_written_over_where_nothing_learns() -> None:
    from transformer_problems.lab.meters.memory import peak_memory_bytes

    plain = FeedForward(64)
    fused, x = FuseFeedForward()(plain), torch.randn(256, 64)
    assert fused.backend_for(x) == "cpp"
    with torch.no_grad():
        plain(x), fused(x)
        before, after = (peak_memory_bytes(lambda net=net: net(x), device="cpu") for net in (plain, fused))
    assert before - after == 256 * 256 * 4 - 256 * 64 * 4  # one inner layer less, but then the output beside the other


def test_fused_layers_can_be_rounded_and_adapted_afterwards() -> None:
    model = decoder()
    fused = Chain(FuseProjections(), FuseFeedForward())(model)
    rounded = QuantizeInt8()(fused)
    block = rounded.body.blocks[0]
    assert isinstance(block.mixer.qkv_proj, Int8Linear) and isinstance(block.feed_forward.up, Int8Linear)
    assert not list(block.feed_forward._shell[0].parameters())  # the floats are not kept out of sight
    with torch.no_grad():
        y, expected = rounded(TOKENS), QuantizeInt8()(model)(TOKENS)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # rows keep their scales, so codes are the same
    adapted = LoRA(rank=2, targets=("*.qkv_proj", "*.up"))(fused)
    assert_same(adapted, model)
    with pytest.raises(ArgumentError, match="holds none. Undo later treatments first"):
        FuseProjections().undo(rounded)
    assert equal_states(FuseProjections().undo(FuseFeedForward().undo(LoRA(rank=2).undo(adapted))), model)


def test_pruned_models_can_be_fused() -> None:
    pruned = StructuredPruning(heads=0.5, neurons=0.5)(decoder())
    assert_same(Chain(FuseProjections(), FuseFeedForward())(pruned), pruned)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.5, self.training))
        return y


def test_networks_that_do_more_in_training_or_have_hooks_are_left() -> None:
    with pytest.raises(ArgumentError, match="computes something else"):
        FuseFeedForward()(nn.Sequential(Dropping()).eval())
    model = decoder()
    model.body.blocks[0].feed_forward.register_forward_hook(lambda *_: None)
    fused = FuseFeedForward()(model)
    assert [type(block.feed_forward).__name__ for block in fused.body.blocks][:2] == ["FeedForward", "FusedFeedForward"]


def test_skipped_layers_stay_and_strange_patterns_are_refused() -> None:
    model = decoder()
    fused = FuseProjections(skip=("*.blocks.0.mixer",))(model)
    assert fused.body.blocks[0].mixer.qkv_proj is None
    assert isinstance(fused.body.blocks[1].mixer.qkv_proj, FusedProjections)
    for fusion, found in (
        (FuseProjections, "attention layer to skip 'lm_head'. Known: body.blocks.0.mixer, "),
        (FuseFeedForward, "feed-forward network to skip 'lm_head'. Known: body.blocks.0.feed_forward, "),
    ):
        with pytest.raises(ArgumentError, match=f"unknown {found}"):
            fusion(skip=("lm_head",))(model)
        with pytest.raises(ArgumentError, match="skip must be a sequence of patterns; got the single text 'x'"):
            fusion(skip="x")
        with pytest.raises(ArgumentError, match="skipped"):
            fusion(skip=("*",))(model)
    assert repr(FuseProjections(skip=("a",))) == "FuseProjections(skip=('a',))"


@pytest.mark.parametrize("fusion", FUSIONS[:2], ids=repr)
def test_models_without_anything_to_fuse_are_told_what_was_looked_for(fusion: ModelTransform) -> None:
    what = "q_proj, k_proj, v_proj" if isinstance(fusion, FuseProjections) else "linear layers up and down alone"
    with pytest.raises(ArgumentError, match=f"model must hold .*{what}.*this Sequential holds none"):
        fusion(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ArgumentError, match="already"):
        fusion(fusion(decoder()))


@pytest.mark.parametrize("fusion", FUSIONS[:2], ids=repr)
def test_models_of_codes_adapters_and_scales_are_refused(fusion: ModelTransform) -> None:
    model = decoder()
    for treatment, error, message in (
        (QuantizeInt8(), CombinationError, "makes no sense on .*, a Int8Linear: codes of separate layers"),
        (LoRA(rank=2), CombinationError, "makes no sense on .*, a LoRALinear: the adapters belong to separate layers"),
        (SmoothQuant([TOKENS]), CombinationError, "must be a plain torch.nn.Linear to be fused; it is a ScaledLinear"),
        (MagnitudePruning(0.5), CombinationError, "must be a plain torch.nn.Linear to be fused; it is a SparseLinear"),
    ):
        treated = treatment(model)
        before = copy.deepcopy(treated)
        with pytest.raises(error, match=message):
            fusion(treated)
        assert equal_states(treated, before)


def test_projections_that_cannot_be_one_are_refused() -> None:
    def changed(change: Callable[[SelfAttention], object]) -> SelfAttention:
        layer = SelfAttention(WIDTH, 4, bias=True)
        change(layer)
        return layer

    def set_k(**options: object) -> Callable[[SelfAttention], None]:
        return lambda layer: setattr(
            layer, "k_proj", nn.Linear(**{"in_features": WIDTH, "out_features": 16, **options})
        )

    for change, message in (
        (set_k(in_features=8), "0: layers that become one must read inputs of one width; got 16, 8, 16"),
        (set_k(bias=False), "all have a bias or none; got True, False, True"),
        (set_k(dtype=torch.float64), "be of one dtype; got torch.float32, torch.float64"),
        (lambda layer: layer.k_proj.requires_grad_(False), "all learn or none"),
        (lambda layer: setattr(layer, "k_proj", layer.v_proj), "weights must belong to one layer; k_proj of 0"),
        (lambda layer: setattr(layer.k_proj, "weight", layer.v_proj.weight), "must belong to one layer; k_proj of 0"),
        (lambda layer: layer.q_proj.register_forward_hook(lambda *_: None), "q_proj of 0 must be .*; it has hooks"),
        (lambda layer: layer.q_proj.weight.data.fill_(torch.nan), "weights must be finite; 0.q_proj.weight"),
    ):
        model = nn.Sequential(changed(change))
        with pytest.raises(ArgumentError, match=message):
            FuseProjections()(model)
        assert model[0].qkv_proj is None


def test_attention_that_asks_one_by_one_is_refused_by_name() -> None:
    layer = LongformerAttention(WIDTH, 4, window_size=2)
    with pytest.raises(CombinationError, match="0, a LongformerAttention, asks for q_proj, k_proj, v_proj one by one"):
        FuseProjections()(nn.Sequential(layer))
    fused = FuseProjections(skip=("0",))(nn.Sequential(layer, SelfAttention(WIDTH, 4)))
    assert isinstance(fused[1].qkv_proj, FusedProjections)


def test_models_of_other_packages_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="0, a MultiheadAttention, has in_proj_weight of its own kind. Compile"):
        FuseProjections()(nn.Sequential(nn.MultiheadAttention(8, 2)))


@pytest.mark.peer
def test_bert_is_refused_by_name() -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ArgumentError, match="a BertSelfAttention, has query, key, value of its own kind"):
        FuseProjections()(bert)
    with pytest.raises(ArgumentError, match="this BertModel holds none. Compile it instead"):
        FuseFeedForward()(bert)
    compiled = CompileGraph(backend="eager")(bert.eval())
    assert torch.equal(compiled(TOKENS).last_hidden_state, bert(TOKENS).last_hidden_state)


def test_autocast_and_exports_take_fused_models() -> None:
    model = encoder()
    fused = Chain(FuseProjections(), FuseFeedForward())(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(TOKENS), model(TOKENS), rtol=0.05, atol=0.05)  # bfloat16 has 8 bits
    program = torch.export.export(fused, (TOKENS,))
    assert not any("bias_gelu" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
