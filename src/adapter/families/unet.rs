//! The UNet of Stable Diffusion 1, 2 and XL: diffusers counts blocks and the layers in them, Stability AI's own code
//! (`sgm`) counts through.

use super::{Clue, Family};

/// Layers of a block, and its sampler.
const LAYERS: usize = 3;

/// Modules of a residual block: native, and in diffusers.
const RESNET: &[(&str, &str)] = &[
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// Modules outside of the blocks.
const OUTER: &[(&str, &str)] = &[
    ("input_blocks.0.0", "conv_in"),
    ("time_embed.0", "time_embedding_linear_1"),
    ("time_embed.2", "time_embedding_linear_2"),
    ("label_emb.0.0", "add_embedding_linear_1"),
    ("label_emb.0.2", "add_embedding_linear_2"),
    ("out.2", "conv_out"),
];

pub(super) fn is_diffusers(flat: &str) -> bool {
    ["down_blocks_", "up_blocks_", "mid_block_"].iter().any(|start| flat.starts_with(start))
}

/// The name in diffusers' spelling of a flat name in Stability AI's.
pub(super) fn from_sgm(flat: &str) -> Option<String> {
    if let Some((_, name)) = OUTER.iter().find(|(native, _)| super::capture(native, flat).is_some()) {
        return Some((*name).to_owned());
    }
    if let Some(rest) = flat.strip_prefix("middle_block_") {
        let (i, rest) = number(rest)?;
        return match i {
            0 | 2 => Some(format!("mid_block_resnets_{}_{}", i / 2, resnet(rest)?)),
            1 => Some(format!("mid_block_attentions_0_{rest}")),
            _ => None,
        };
    }
    if let Some(rest) = flat.strip_prefix("input_blocks_") {
        let (i, rest) = number(rest)?;
        let (j, rest) = number(rest)?;
        let (block, layer) = (i.checked_sub(1)? / LAYERS, (i - 1) % LAYERS);
        return match (j, layer) {
            (0, 2) => (rest == "op").then(|| format!("down_blocks_{block}_downsamplers_0_conv")),
            (0, _) => Some(format!("down_blocks_{block}_resnets_{layer}_{}", resnet(rest)?)),
            (1, 0 | 1) => Some(format!("down_blocks_{block}_attentions_{layer}_{rest}")),
            _ => None,
        };
    }
    let (i, rest) = number(flat.strip_prefix("output_blocks_")?)?;
    let (j, rest) = number(rest)?;
    let (block, layer) = (i / LAYERS, i % LAYERS);
    match j {
        0 => Some(format!("up_blocks_{block}_resnets_{layer}_{}", resnet(rest)?)),
        // Without attention, the sampler is next.
        1 | 2 if rest == "conv" && layer == 2 => Some(format!("up_blocks_{block}_upsamplers_0_conv")),
        1 => Some(format!("up_blocks_{block}_attentions_{layer}_{rest}")),
        _ => None,
    }
}

/// The dotted name in Stability AI's spelling of a key.
pub(super) fn to_sgm(key: &str, xl: bool) -> Option<String> {
    if let Some((native, _)) = OUTER.iter().find(|(_, name)| *name == key) {
        return Some((*native).to_owned());
    }
    let dotted = |rest: &str| super::unflatten(rest);
    if let Some(rest) = key.strip_prefix("mid_block_") {
        return match rest.strip_prefix("resnets_") {
            Some(rest) => {
                let (i, rest) = number(rest)?;
                Some(format!("middle_block.{}.{}", i.checked_mul(2)?, native_resnet(rest)?))
            }
            None => Some(format!("middle_block.1.{}", dotted(rest.strip_prefix("attentions_0_")?))),
        };
    }
    let (up, rest) = match key.strip_prefix("down_blocks_") {
        Some(rest) => (false, rest),
        None => (true, key.strip_prefix("up_blocks_")?),
    };
    let (block, rest) = number(rest)?;
    let first = block.checked_mul(LAYERS)?.checked_add(usize::from(!up))?;
    let name = if up { "output_blocks" } else { "input_blocks" };
    match rest {
        "downsamplers_0_conv" if !up => return Some(format!("input_blocks.{}.0.op", first + 2)),
        // The lowest block of Stable Diffusion 1 has no attention before its sampler.
        "upsamplers_0_conv" if up => {
            let j = if block == 0 && !xl { 1 } else { 2 };
            return Some(format!("output_blocks.{}.{j}.conv", first + 2));
        }
        _ => {}
    }
    let (kind, rest) = rest.split_once('_')?;
    let (layer, rest) = number(rest)?;
    let i = first.checked_add(layer)?;
    match kind {
        "resnets" => Some(format!("{name}.{i}.0.{}", native_resnet(rest)?)),
        "attentions" => Some(format!("{name}.{i}.1.{}", dotted(rest))),
        _ => None,
    }
}

/// The name of a projection by an attention processor of 2023: `attn1_processor_to_q_lora`.
pub(super) fn from_processor(flat: &str) -> Option<String> {
    let (path, name) = flat.strip_suffix("_lora")?.rsplit_once("_processor_")?;
    match name {
        "to_q" | "to_k" | "to_v" => Some(format!("{path}_{name}")),
        "to_out" => Some(format!("{path}_to_out_0")),
        _ => None,
    }
}

/// Kernels of the convolutions that are adapted.
pub(super) fn kernel(key: &str, input: usize, convolved_proj: bool) -> Option<Vec<usize>> {
    let ends = |ends: &[&str]| ends.iter().any(|end| key.ends_with(end));
    if ends(&["_conv1", "_conv2", "samplers_0_conv"]) || matches!(key, "conv_in" | "conv_out") {
        return input.is_multiple_of(9).then(|| vec![3, 3]);
    }
    let proj = convolved_proj && key.contains("_attentions_") && !key.contains("_transformer_blocks_");
    (ends(&["_conv_shortcut"]) || (proj && ends(&["_proj_in", "_proj_out"]))).then(|| vec![1, 1])
}

/// Which UNet it is: XL has a second text encoder and several transformers in a block, and attention reads 768, 1024
/// or 2048 features of the prompt.
pub(super) fn recognise(clues: &[Clue], second_encoder: bool, said: Option<Family>) -> Family {
    let deep = |key: &str| {
        let rest = key.split_once("_transformer_blocks_").map(|(_, rest)| rest);
        rest.and_then(number).is_some_and(|(i, _)| i > 0)
    };
    let prompt = clues.iter().find(|c| c.key.ends_with("_attn2_to_k") || c.key.ends_with("_attn2_to_v"));
    if second_encoder || clues.iter().any(|c| c.component.is_empty() && deep(c.key)) {
        return Family::Sdxl;
    }
    match (prompt.map(|c| c.input), said) {
        (Some(768), _) => Family::Sd1,
        (Some(1024), _) => Family::Sd2,
        (Some(2048), _) => Family::Sdxl,
        (_, Some(family)) if family.is_unet() => family,
        _ => Family::Sd1,
    }
}

fn resnet(rest: &str) -> Option<&'static str> {
    RESNET.iter().find(|(native, _)| super::capture(native, rest).is_some()).map(|(_, name)| *name)
}

fn native_resnet(rest: &str) -> Option<&'static str> {
    RESNET.iter().find(|(_, name)| *name == rest).map(|(native, _)| *native)
}

/// The number in front, and what follows the underscore after it.
fn number(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('_')?;
    let digits = !number.is_empty() && number.len() < 9 && number.bytes().all(|b| b.is_ascii_digit());
    // `04` would not come back.
    let plain = digits && (number == "0" || !number.starts_with('0'));
    plain.then(|| number.parse().ok()).flatten().map(|n| (n, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_both_ways() {
        for (native, diffusers) in [
            (
                "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
                "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            ),
            ("input_blocks.8.1.proj_in", "down_blocks_2_attentions_1_proj_in"),
            ("input_blocks.3.0.op", "down_blocks_0_downsamplers_0_conv"),
            ("input_blocks.1.0.in_layers.2", "down_blocks_0_resnets_0_conv1"),
            ("input_blocks.0.0", "conv_in"),
            ("middle_block.0.out_layers.3", "mid_block_resnets_0_conv2"),
            ("middle_block.2.emb_layers.1", "mid_block_resnets_1_time_emb_proj"),
            (
                "middle_block.1.transformer_blocks.9.ff.net.0.proj",
                "mid_block_attentions_0_transformer_blocks_9_ff_net_0_proj",
            ),
            (
                "output_blocks.0.1.transformer_blocks.0.attn2.to_out.0",
                "up_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
            ),
            ("output_blocks.5.2.conv", "up_blocks_1_upsamplers_0_conv"),
            ("output_blocks.8.0.skip_connection", "up_blocks_2_resnets_2_conv_shortcut"),
        ] {
            assert_eq!(from_sgm(&native.replace('.', "_")).as_deref(), Some(diffusers));
            assert_eq!(to_sgm(diffusers, true).as_deref(), Some(native));
        }
        assert_eq!(from_sgm("output_blocks_2_1_conv").as_deref(), Some("up_blocks_0_upsamplers_0_conv"));
        assert_eq!(to_sgm("up_blocks_0_upsamplers_0_conv", false).as_deref(), Some("output_blocks.2.1.conv"));
        for name in [
            "input_blocks_0_1_x",
            "middle_block_7_x",
            "input_blocks_3_0_x",
            "output_blocks_1_7_x",
            "input_blocks_99999999999_0_op",
        ] {
            assert_eq!(from_sgm(name), None, "{name}");
        }
    }
}
