"""Tiny pipelines with random weights, and random LoRAs for them that diffusers and PEFT write themselves."""

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPT = "a sks cat"

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FLUX = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "norm1.linear", "proj_mlp", "norm.linear"]
# Not the model's last layer, also called proj_out, which diffusers 0.42 drops from files in kohya's spelling.
FLUX += [f"single_transformer_blocks.{i}.proj_out" for i in range(2)]
SDXL = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "attentions.0.proj_in", "attentions.0.proj_out"]
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def quiet(pipe):
    """Without progress bars, and without T5's dropout."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe


def tokenizer():
    """A token for each character."""
    vocab = ["<pad>", "<end>", "<unk>", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    tokens = dict(pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **tokens)


def clip(kind):
    return kind(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=64, projection_dim=32, num_attention_heads=4, num_hidden_layers=2,
            vocab_size=98, max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=0,
        )
    )  # fmt: skip


def vae():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def flux(layers=2, heads=2, head_dim=16, axes=(4, 4, 8)):
    """FLUX.1 with two blocks of each kind and a width of 32."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=layers, num_attention_heads=heads,
        attention_head_dim=head_dim, axes_dims_rope=axes, joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    t5 = T5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    scheduler = FlowMatchEulerDiscreteScheduler()
    encoders = clip(CLIPTextModel), T5EncoderModel(t5)
    return quiet(FluxPipeline(scheduler, vae(), encoders[0], tokenizer(), encoders[1], tokenizer(), transformer))


def flux_wide():
    """One block of each kind at FLUX.1's own width, which readers of fused layers count on."""
    return flux(layers=1, heads=24, head_dim=128, axes=(16, 56, 56))


def sdxl():
    """Stable Diffusion XL's UNet with two levels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), cross_attention_dim=64, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32, sample_size=16,
    )  # fmt: skip
    encoders = clip(CLIPTextModel), clip(CLIPTextModelWithProjection)
    scheduler = EulerDiscreteScheduler()
    return quiet(StableDiffusionXLPipeline(vae(), *encoders, tokenizer(), tokenizer(), unet, scheduler))


PIPELINES = {"flux": flux, "flux-wide": flux_wide, "sdxl": sdxl}


def denoiser(pipe):
    """The name of what makes images in a pipeline, and the module."""
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return name, getattr(pipe, name)


def randomise(model, seed, size=0.3):
    """Fills the factors of every LoRA layer. The adapter changes the output about as much as the base makes it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(values * (size if "lora_B" in name else 1.0))


def save_lora(pipe, path, seed, rank, alpha, targets, encoders):
    """Writes a random LoRA of the denoiser and text encoders with `save_lora_weights`; returns the path."""
    layers = {}
    for component, modules in {denoiser(pipe)[0]: targets, **dict.fromkeys(encoders, ENCODER)}.items():
        model = getattr(pipe, component)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
        model.add_adapter(config, "made")
        randomise(model, seed)
        state = get_peft_model_state_dict(model, adapter_name="made")
        layers[f"{component}_lora_layers"] = {key: value.clone() for key, value in state.items()}
        layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
        model.delete_adapters("made") if hasattr(model, "delete_adapters") else model.delete_adapter("made")
    pipe.save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


RANKS, ALPHAS = {"first": 4, "second": 6}, {"first": 8, "second": 3}


def adapters(pipe, folder):
    """Two LoRAs of different ranks, scales and sets of layers: {name: file}. One text encoder is in both."""
    targets = FLUX if is_flux(pipe) else SDXL
    encoders = ["text_encoder"] if is_flux(pipe) else ["text_encoder", "text_encoder_2"]
    plans = {"first": (targets, encoders), "second": (ATTENTION, encoders[:1])}
    return {
        name: save_lora(pipe, folder / f"{name}.safetensors", seed, RANKS[name], ALPHAS[name], *plan)
        for seed, (name, plan) in enumerate(plans.items())
    }


def is_flux(pipe):
    return denoiser(pipe)[0] == "transformer"


def call(pipe):
    """Arguments that keep a run small: one step, and no decoding."""
    lengths = dict(max_sequence_length=16) if is_flux(pipe) else {}
    return dict(height=16, width=16, num_inference_steps=1, output_type="latent", **lengths)


@torch.no_grad()
def denoise(pipe):
    """What the denoiser makes in the last step of a run from fixed noise."""
    seen = []
    hook = denoiser(pipe)[1].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        pipe(PROMPT, generator=torch.Generator().manual_seed(7), **call(pipe))
    finally:
        hook.remove()
    return seen[-1].double().cpu()


def difference(x, y):
    """The largest difference, relative to the largest value."""
    return ((x - y).abs().max() / y.abs().max()).item()
