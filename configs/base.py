"""The base of every experiment: all keys, what they mean, and the published recipe as their values.

Every other config is a diff of this one. A key that is not here does not exist: unknown keys,
wrong types and contradictions are refused at start (t2i_jax/config.py).

Units: sizes in pixels, lengths in tokens, everything that counts training in optimiser steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The published setting at Gemma 2B's scale (FuseDiT, arXiv 2505.10046, section 3)."""
    config = ConfigDict()
    config.name = "base"  # names the default working directory, runs/<name>
    config.seed = 42  # randomness is a function of (seed, step), data order of (seed, position)

    # Files that training starts from. '' means: made here, from the captions of the data.
    config.weights = ConfigDict()
    config.weights.llm = "weights/gemma-2b"  # Hugging Face directory with *.safetensors
    config.weights.tokenizer = "weights/gemma-2b"  # directory with tokenizer.json, or vocab.json
    config.weights.autoencoder = "weights/sd3-vae"  # diffusers AutoencoderKL directory
    config.weights.clip = "weights/sd3-clip"  # holds text_encoder/ and tokenizer/; see clip below
    config.weights.start = ""  # a model whose trained weights are the first ones; '' = random

    # The frozen language model (Gemma 2B; other families differ in these keys). With
    # weights.llm it is what that directory's config.json says, or its first num_layers layers; the
    # DiT shares its heads: N, K and H.
    config.llm = ConfigDict()
    config.llm.vocab_size = 256_000  # V
    config.llm.width = 2048  # D
    config.llm.num_layers = 18  # L
    config.llm.num_heads = 8  # N, query heads
    config.llm.num_kv_heads = 1  # K, key/value heads; divides num_heads
    config.llm.head_width = 256  # H
    config.llm.mlp_width = 16_384  # F
    config.llm.rope_theta = 10_000.0  # base of the rotary frequencies
    config.llm.norm_eps = 1e-6  # RMSNorm epsilon
    config.llm.norm_offset = 1.0  # RMSNorm's factor is this + weight: 1, or 0 for Qwen3
    config.llm.activation = "gelu"  # 'gelu' (its tanh form) | 'silu': of the gated MLP
    config.llm.scale_embedding = True  # times sqrt(width)
    config.llm.post_norms = False  # RMSNorm after attention and after the MLP too (Gemma 2)
    config.llm.qk_norm = False  # RMSNorm of every head's queries and keys (Qwen3)
    config.llm.query_scalar = 0.0  # scores are scaled by this**-0.5; 0 = head_width
    config.llm.softcap = 0.0  # c: a scaled score s becomes c tanh(s / c); 0 = none, Gemma 2: 50
    config.llm.softcap_shared = False  # in layers that the DiT shares, too; published: no
    config.llm.logit_softcap = 0.0  # the same of the next token's logits; 0 = none, Gemma 2: 30
    config.llm.max_tokens = 8192  # longest text for which this is the published network, BOS too
    config.llm.unroll = 1  # layers compiled into one turn of the loop over layers

    # Pre-training of the language model, used when weights.llm is ''.
    config.pretrain = ConfigDict()
    config.pretrain.steps = 0  # optimiser steps of next-token prediction on the captions
    config.pretrain.batch_size = 256  # captions a step
    config.pretrain.learning_rate = 3e-3  # peak; linear warm-up, cosine to zero
    config.pretrain.vocab_size = (
        0  # of the tokenizer trained on the captions (weights.tokenizer '')
    )

    # What the DiT sees of the text (t2i_jax/models/memory.py).
    config.memory = ConfigDict()
    config.memory.source = "deep"  # 'deep' | 'shallow' | 'middle' | 'mixture'
    config.memory.first_layer = 0  # of the layers shared by 'middle', which end with the LLM's last

    # The trained diffusion transformer. Heads, rope_theta and norm_eps are the LLM's.
    config.dit = ConfigDict()
    config.dit.width = 2048  # D
    config.dit.num_layers = 18  # a 'deep' source shares the last num_layers layers of the LLM
    config.dit.mlp_width = 16_384  # F; the published models take the LLM's
    config.dit.patch_size = 2  # P, in latent pixels
    config.dit.attention = "joint"  # 'joint' (one softmax over [text; image]) | 'cross'
    config.dit.positions = "2d-rope"  # '1d-rope' | '2d-rope' | 'm-rope' | 'none', of image tokens
    config.dit.table_size = 0  # side, in patches, of a table of absolute positions; 0 = no table
    config.dit.table_range = 16.0  # over which rows and columns of the table run
    # How the time enters: 'adaln-zero' | 'adaln-single' | 'addition' | 'none'.
    config.dit.conditioning = "adaln-zero"
    config.dit.pooled_width = 0  # of CLIP's embedding, which is added to the time's; 0 = no CLIP
    config.dit.prediction = "velocity"  # 'velocity' | 'data': what the network's output is
    config.dit.qk_norm = True  # RMSNorm on the DiT's own queries and keys
    config.dit.sandwich_norm = False  # a second norm after attention and MLP
    # What the backward pass recomputes; models/layers.py says what each of these keeps, docs/tpu.md
    # what that is in GB. 'products' recomputes no product.
    config.dit.remat = "products"  # 'none' | 'products' | 'outputs' | 'offload' | 'full'
    config.dit.unroll = 1  # layers compiled into one turn of the loop over layers

    # Fine-tuning by low-rank factors of the products of the DiT, and of a source's layers
    # (models/lora.py): they alone are trained and stored; weights.start is their base.
    config.lora = ConfigDict()
    config.lora.rank = 0  # r; 0 = off, all of the DiT is trained
    config.lora.alpha = 16.0  # the factors' product is scaled by alpha / rank
    config.lora.products = "all"  # 'all' | 'attention' | 'mlp', of the blocks

    # The frozen CLIP text encoder (SD3's first, CLIP L), used only where dit.pooled_width > 0.
    config.clip = ConfigDict()
    config.clip.vocab_size = 49_408
    config.clip.width = 768
    config.clip.num_layers = 12
    config.clip.num_heads = 12
    config.clip.mlp_width = 3072
    config.clip.max_tokens = 77  # captions are cut and padded to it, BOS and EOS included
    config.clip.projection_width = 768  # of the embedding: dit.pooled_width; 0 = none, its width
    config.clip.activation = "quick_gelu"  # 'quick_gelu' | 'gelu'
    config.clip.eos_id = 2  # token whose state is the embedding; 2 = the largest id of the prompt
    config.clip.norm_eps = 1e-5  # LayerNorm epsilon

    # Pixels <-> latents.
    config.autoencoder = ConfigDict()
    config.autoencoder.kind = "kl"  # 'kl' (AutoencoderKL) | 'identity' (train on pixels)
    config.autoencoder.channels = 16  # C of the latents (3 for identity)
    config.autoencoder.downsample = 8  # pixels a latent pixel (1 for identity)
    config.autoencoder.scale = 1.5305  # latent = (sample - shift) * scale
    config.autoencoder.shift = 0.0609
    config.autoencoder.tile = 0  # latent pixels a side that are decoded at once; 0 = all

    # The flow: path, timesteps (t2i_jax/diffusion).
    config.flow = ConfigDict()
    config.flow.shift = 3.0  # timestep shift: sigma' = shift s / (1 + (shift - 1) s)
    config.flow.num_timesteps = 1000  # size of the discrete training schedule
    config.flow.time_mean = 0.0  # logit-normal timesteps: sigmoid(N(mean, std))
    config.flow.time_std = 1.0

    config.data = ConfigDict()
    # 'webdataset' | 'folder' | 'arrayrecord' | 'tfds' | 'latents' | 'scenes' | 'digits'
    config.data.source = "webdataset"
    config.data.path = "data/cc12m-recaptioned/cc12m-train-{0000..2175}.tar"  # glob, braces, '::'
    config.data.mixture = ()  # several sources: ("weight=0.7 path=A", "weight=0.3 path=B")
    config.data.index_dir = ""  # of indexes and image sizes; '' = beside the shards, or a cache
    config.data.image_field = "image.jpg"  # members of a shard, columns or features elsewhere
    config.data.caption_field = "synthetic_caption.txt"  # several with commas: one is drawn
    config.data.original_caption_field = "original_caption.txt"
    config.data.original_caption_rate = 0.0  # how often the original caption is used instead
    config.data.image_size = 512  # resize the shorter side (bilinear), then crop
    # Shapes to train on instead of the square, ("512x512", "576x448", ...), width x height: every
    # batch has one of them, every picture is in that nearest to its own; () = the square alone.
    config.data.buckets = ()
    config.data.center_crop = True  # False: a random crop
    config.data.flip = False  # mirror half of the images; wrong where captions say left or right
    config.data.shuffle_captions = False  # a control: every picture gets another sample's caption
    config.data.caption_dropout = 0.1  # how often the caption is replaced by ''
    config.data.instruction = ""  # put before every caption, not before the dropped one
    config.data.chat_template = False  # wrap captions in the tokenizer's, as one user turn
    config.data.add_generation_prompt = False  # and let the template open the model's answer
    config.data.max_text_tokens = 256  # captions are cut to it, BOS included, and right-padded
    # Lengths that a batch is cut to, the least that holds its longest text; () = never cut.
    config.data.text_buckets = ()
    config.data.validation_size = 512  # samples held out: the last ones of the source
    config.data.min_image_size = 32  # pixels of the shorter side; less is a bad sample
    config.data.max_caption_chars = 10_000  # of a caption; more is a bad sample
    # Training stops where more than this share of the newest 2,000 samples, or of shards, is bad.
    config.data.max_bad_rate = 0.05
    config.data.num_threads = 16  # decoding threads a host
    config.data.num_workers = 0  # processes a host that these threads are in; 0 = this process
    config.data.prefetch = 4  # batches made ahead

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # 'adamw' | 'muon' (matrices by Muon, the rest by AdamW)
    config.optimizer.learning_rate = 1e-4  # AdamW's
    config.optimizer.muon_learning_rate = 0.02  # Muon's, on the matrices
    config.optimizer.muon_steps = 5  # Newton-Schulz iterations of an update
    config.optimizer.weight_decay = 1e-4  # decoupled, on every trained parameter, as published
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 1.0  # global norm of the gradient
    config.optimizer.warmup_steps = 0  # linear, from 1/warmup_steps of the rate
    config.optimizer.schedule = "constant"  # 'constant' | 'linear' | 'cosine': what follows warm-up
    config.optimizer.decay_steps = 0  # length of the final decay to zero; 0 = all after warm-up

    config.ema = ConfigDict()
    config.ema.decay = 0.99
    config.ema.every = 100  # steps between updates
    config.ema.warmup = False  # decay less at first: for runs of few updates

    config.train = ConfigDict()
    config.train.steps = 500_000
    config.train.batch_size = 512  # global
    config.train.accumulation = 1  # microbatches a step; what is frozen reads the whole batch
    config.train.dtype = "bfloat16"  # of the computation; masters, norms and loss are float32
    config.train.attention = "auto"  # 'auto' | 'xla' | 'splash' | 'cudnn': kernel of attention
    config.train.frozen_dtype = "bfloat16"  # of the stored LLM and autoencoder
    # 'none' | 'int8': the LLM's matrices when it is loaded, whatever its files hold. int8: half the
    # memory and half the bytes that are gathered of them (t2i_jax/quantization.py).
    config.train.llm_quantization = "none"
    config.train.log_every = 10  # steps between lines of metrics.jsonl
    # Seconds after which a run that does not get on is ended, with the stacks of all threads; 0 =
    # never. Of a step; and of what is rare and slow: setting up, the first step of a shape (it
    # compiles), validation, pictures, waiting for a checkpoint to be written.
    config.train.step_deadline = 1800.0
    config.train.pause_deadline = 7200.0

    # Optional, beside metrics.jsonl, speed.jsonl and TensorBoard.
    config.train.block_norms = False  # norms of gradient, weights and update, block by block
    config.train.wandb = ""  # project of Weights & Biases; '' = none

    # A trace by JAX's profiler in <workdir>/profile, of a start of the run.
    config.profile = ConfigDict()
    config.profile.start = 10  # steps before it, from 1: the first one of a start compiles
    config.profile.steps = 0  # traced steps; 0 = no trace

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5000  # steps
    config.checkpoint.keep = 3  # newest ones kept
    config.checkpoint.keep_every = 0  # steps; those of its multiples are kept for ever; 0 = none

    config.validation = ConfigDict()
    config.validation.every = 5000  # steps; 0 = never
    config.validation.timesteps = (0.1, 0.3, 0.5, 0.7, 0.9)  # fixed t at which the loss is taken

    config.sampling = ConfigDict()
    config.sampling.steps = 25
    # 'euler' | 'heun' | 'midpoint' | 'dpmpp_2m' | 'unipc' | 'ancestral' (diffusion/solvers.py)
    config.sampling.solver = "euler"
    config.sampling.guidance = 6.0  # classifier-free guidance scale; 1 = conditional only
    # 'plain' | 'rescaled' | 'apg' | 'cfg-zero' (diffusion/guidance.py)
    config.sampling.guidance_method = "plain"
    config.sampling.guidance_interval = (0.0, 1.0)  # steps from low < t <= high are guided
    config.sampling.guidance_rescale = 0.7  # of 'rescaled': share of the rescaled velocity
    config.sampling.apg_parallel = 0.0  # of 'apg': what is left along the prediction
    config.sampling.apg_norm = 0.0  # of 'apg': largest norm of an image's change; 0 = any
    config.sampling.apg_momentum = -0.5  # of 'apg': share of earlier changes in the next one
    config.sampling.zero_steps = 1  # of 'cfg-zero': first steps in which nothing moves
    config.sampling.batch_size = 32  # images drawn at once, all devices together
    config.sampling.every = 5000  # steps between pictures drawn in training; 0 = never
    config.sampling.prompts = (  # what those pictures show
        "a photo of a red apple on a wooden table",
        "a corgi wearing sunglasses on the beach",
        "an oil painting of a lighthouse in a storm",
        "two blue cups to the left of a yellow vase",
    )

    # Scores of the averaged weights in metrics.jsonl: of a built-in world its own, of other data
    # FID to held-out pictures and the CLIP score (t2i_jax/training/exam.py).
    config.evaluation = ConfigDict()
    config.evaluation.every = 0  # steps; 0 = never
    config.evaluation.num_images = 300  # drawn each time; of other data at most those held out
    config.evaluation.inception = ""  # weights of FID's network, a .safetensors; '' = no FID
    config.evaluation.clip = ""  # directory of a CLIP of transformers; '' = no CLIP score

    # devices = data x fsdp x tensor. One of them may be -1: the rest; data and fsdp both: 8 to 64
    # shards, along whole axes of a slice's torus but not all of them, and replicas of these.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # replicas of the parameters; a multiple of the slices
    config.mesh.fsdp = -1  # shards of parameters, optimiser state and batch
    config.mesh.tensor = 1  # shards of heads and MLPs, whose numbers it divides
    return config.lock()
