// 4 neighbouring channels of f16 or bf16 features. The permutation sets DTYPE.

#import shared/words
#import shared/pack

alias Raw = vec2<u32>;
const RAW_WORDS: u32 = 2u;

// Minus infinity, which stands for a channel that is not there.
const NOWHERE: u32 = select(0xff80ff80u, 0xfc00fc00u, DTYPE == F16);

fn widened(raw: Raw) -> vec4<f32> {
    return vec4<f32>(unpack_halves(raw.x, DTYPE), unpack_halves(raw.y, DTYPE));
}

fn narrowed(f: vec4<f32>) -> Raw {
    // The usual case needs no more; pack.wgsl says what the other is for.
    let size = max(max(abs(f.x), abs(f.y)), max(abs(f.z), abs(f.w)));
    if (DTYPE == F16 && size < 65504.0) {
        return Raw(pack2x16float(f.xy), pack2x16float(f.zw));
    }
    return Raw(pack_halves(f.xy, DTYPE), pack_halves(f.zw, DTYPE));
}
