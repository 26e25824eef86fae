// 4 neighbouring channels of f32 features; features_halves.wgsl is the same for f16 and bf16.

alias Raw = vec4<u32>;
const RAW_WORDS: u32 = 4u;

// Minus infinity, which stands for a channel that is not there.
const NOWHERE: u32 = 0xff800000u;

fn widened(raw: Raw) -> vec4<f32> {
    return bitcast<vec4<f32>>(raw);
}

fn narrowed(f: vec4<f32>) -> Raw {
    return bitcast<vec4<u32>>(f);
}
