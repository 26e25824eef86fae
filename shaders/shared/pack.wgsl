// Writing f16 and bf16 values to raw words, rounded to nearest even; what is too large becomes infinite, as on
// other hardware (pack2x16float leaves it open).

#import shared/words

fn f16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    let sign = (bits >> 16u) & 0x8000u;
    if (magnitude > 0x7f800000u) {
        return sign | 0x7e00u;
    }
    // What lies halfway between the largest half and the next power of two, or beyond, becomes infinite.
    if (magnitude >= 0x477ff000u) {
        return sign | 0x7c00u;
    }
    return pack2x16float(vec2<f32>(clamp(value, -65504.0, 65504.0), 0.0)) & 0xffffu;
}

fn bf16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

// The word of two halves, the first at the lower address.
fn pack_halves(pair: vec2<f32>, dtype: u32) -> u32 {
    if (dtype == F16) {
        return f16_bits(pair.x) | (f16_bits(pair.y) << 16u);
    }
    return bf16_bits(pair.x) | (bf16_bits(pair.y) << 16u);
}
