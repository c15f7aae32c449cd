"""A suite of seconds: two names for one design, and another design."""

from configs.suites import paper_small


def get_config():
    config = paper_small.get_config().unlock()
    config.name = "tiny_suite"
    config.llm.update(width=32, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=32)
    config.llm.update(head_width=16, unroll=1)
    config.dit.update(width=32, num_layers=2, mlp_width=32, unroll=1)
    config.pretrain.update(steps=3, batch_size=8)
    config.optimizer.warmup_steps = 1
    config.train.update(steps=6, batch_size=8)
    config.checkpoint.every = 2
    config.data.validation_size = 16
    config.validation.every = 3
    config.evaluation.update(every=3, num_images=6)
    config.sampling.update(steps=2, solver="euler", every=0)
    config.sampling.prompts = config.sampling.prompts[:2]
    return config.lock()


ROWS = [
    ("baseline", {}),
    ("the-same", {}),
    ("no-temb", {"dit.conditioning": "none"}),
]
CLAIMS = [
    {
        "claim": "It can go",
        "where": "the paper",
        "rows": ("no-temb", "baseline"),
        "measure": "score",
        "expects": "not less",
    }
]
