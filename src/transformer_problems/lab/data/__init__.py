"""What the experiments train and test on: real text first, synthetic tasks where the literature's test is one."""
