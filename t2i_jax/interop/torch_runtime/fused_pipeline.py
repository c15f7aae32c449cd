"""From prompts to images with a fused transformer, in PyTorch.

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    image = pipe("a red ring above a blue square").images[0]

A prompt is read once, whatever the number of steps.
"""

from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
import torch


class FusedPipeline(DiffusionPipeline):
    """Transformer (with its language model), VAE, scheduler, tokenizer; CLIP where it has one.

    The other arguments are what the model was trained with, and the defaults of a call. Without a
    VAE the latents are the pixels.
    """

    model_cpu_offload_seq = "clip->transformer->vae"
    _optional_components = ["vae", "clip", "clip_tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer,
        scheduler,
        tokenizer,
        vae=None,
        clip=None,
        clip_tokenizer=None,
        image_size: int = 512,
        max_text_tokens: int = 256,
        max_clip_tokens: int = 77,
        instruction: str = "",
        chat_template: bool = False,
        add_generation_prompt: bool = False,
        num_inference_steps: int = 25,
        guidance_scale: float = 6.0,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            tokenizer=tokenizer,
            vae=vae,
            clip=clip,
            clip_tokenizer=clip_tokenizer,
        )
        self.register_to_config(
            image_size=image_size,
            max_text_tokens=max_text_tokens,
            max_clip_tokens=max_clip_tokens,
            instruction=instruction,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        blocks = 1 if vae is None else len(vae.config.block_out_channels)
        self.downsample = 2 ** (blocks - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.downsample)

    # --- text ---

    def _around(self, tokenizer):
        """The ids that a tokenizer puts before and after a text; a BOS that it names it has."""
        inner = tokenizer("a", add_special_tokens=False).input_ids
        ids, bos = tokenizer("a").input_ids, tokenizer.bos_token_id
        start = next(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
        before, after = ids[:start], ids[start + len(inner) :]
        return before if bos is None or before[:1] == [bos] else [bos, *before], after

    def _rows(self, tokenizer, texts, length):
        """Ids of each text, with BOS and EOS as the tokenizer has them, cut to `length`."""
        before, after = self._around(tokenizer)
        room = length - len(before) - len(after)

        def plain(text):  # in which '<eos>' is five characters, no end of the text
            return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

        return [[*before, *plain(text)[:room], *after] for text in texts]

    def _prompt_rows(self, texts, length):
        """The same of prompts, as one turn of the chat template where the model has it."""
        c = self.config
        if not c.chat_template:
            return self._rows(self.tokenizer, texts, length)
        turns = ([{"role": "user", "content": text}] for text in texts)
        options = {"add_generation_prompt": c.add_generation_prompt, "return_dict": False}
        options["sanitize_control_tokens"] = True  # those of the prompt are text, as above
        rows = (self.tokenizer.apply_chat_template(turn, **options) for turn in turns)
        return [list(row)[:length] for row in rows]

    def _padded(self, t, rows, length):
        pad = next(i for i in (t.pad_token_id, t.eos_token_id, t.bos_token_id) if i is not None)
        return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])

    def tokenize(self, prompts):
        """Ids (B, T) and mask (B, T); '' stays '', others come after the instruction."""
        c, t = self.config, self.tokenizer
        (instruction,) = self._prompt_rows([c.instruction.rstrip()], c.max_text_tokens)
        length = c.max_text_tokens + len(instruction) - (t.bos_token_id is not None)
        spoken = iter(self._prompt_rows([c.instruction + p for p in prompts if p], length))
        (silent,) = self._rows(t, [""], length)
        rows = [next(spoken) if p else silent for p in prompts]
        ids = self._padded(t, rows, length)
        lengths = torch.tensor([max(len(row), 1) for row in rows])
        return ids, torch.arange(length) < lengths[:, None]

    def encode_prompt(self, prompts):
        """What the image tokens see of the prompts, one row each."""
        device = self._execution_device
        ids, mask = (x.to(device) for x in self.tokenize(prompts))
        pooled = None
        if self.clip is not None:
            length = self.config.max_clip_tokens
            texts = [self.config.instruction + p if p else "" for p in prompts]
            rows = self._rows(self.clip_tokenizer, texts, length)
            clip_ids = self._padded(self.clip_tokenizer, rows, length)
            output = self.clip(clip_ids.to(device))
            pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return self.transformer.encode_text(ids, mask, pooled)

    # --- images ---

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        negative_prompt="",
        height=None,
        width=None,
        num_inference_steps=None,
        guidance_scale=None,
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        output_type="pil",
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
        return_dict=True,
    ):
        """Images of a prompt or a list of them; of negative prompts one, or one for each.

        `latents` (B, C, height / downsample, width / downsample) are the initial noise; drawn with
        `generator` where they are not given. `output_type` is 'pil', 'np', 'pt' or 'latent'.
        """
        c, cell = self.config, self.downsample * self.transformer.config.dit_config["patch_size"]
        height, width = height or c.image_size, width or c.image_size
        if height % cell or width % cell:
            raise ValueError(f"height {height} and width {width} must be multiples of {cell}.")
        steps = num_inference_steps or c.num_inference_steps
        scale = c.guidance_scale if guidance_scale is None else guidance_scale
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        memory = self.encode_prompt(prompts)
        if scale != 1:
            memory = self._negative(negative_prompt, len(prompts)).join(memory)

        device = self._execution_device
        shape = (len(prompts), self.transformer.config.channels)
        shape += (height // self.downsample, width // self.downsample)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, not {shape}.")
        latents = latents.to(device, torch.float32)
        # Larger images need more noise: arXiv 2403.03206, equation 23.
        area = height * width / c.image_size**2
        self.scheduler.set_shift(self.scheduler.config.shift * area**0.5)
        self.scheduler.set_timesteps(steps, device=device)
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            z = latents if scale == 1 else torch.cat([latents, latents])
            velocity = self.transformer(
                z, self.scheduler.sigmas[i].to(device).expand(len(z)), memory
            )
            if scale != 1:
                null, guided = velocity.chunk(2)
                velocity = null + scale * (guided - null)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {name: latents for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, i, timestep, given).get("latents", latents)

        if output_type != "latent":
            images = self.decode(latents)
            latents = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=latents) if return_dict else (latents,)

    def _negative(self, prompt, count):
        """What the image tokens see of one negative prompt, or of one for each of the prompts."""
        if prompt is None or isinstance(prompt, str):
            return self.encode_prompt([prompt or ""]).repeat(count)
        if len(prompt) == 0 or count % len(prompt):
            raise ValueError(f"{len(prompt)} negative prompts for {count} images.")
        return self.encode_prompt([p for p in prompt for _ in range(count // len(prompt))])

    def decode(self, latents):
        """Images (B, 3, H, W) about [-1, 1] of latents."""
        if self.vae is None:
            return latents
        c = self.vae.config
        latents = latents / c.scaling_factor + (c.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
