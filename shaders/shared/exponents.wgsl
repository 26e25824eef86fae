// Powers of two that bring values into f16's range, and the parts that values are split into there.

const EXPONENT: u32 = 0x7f800000u;

// The exponents of f32 values in place; 0 for those that are not finite.
fn exponents(bits: vec4<u32>) -> vec4<u32> {
    let e = bits & vec4<u32>(EXPONENT);
    return select(e, vec4<u32>(0u), e == vec4<u32>(EXPONENT));
}

fn largest_of(exponents: vec4<u32>) -> u32 {
    return max(max(exponents.x, exponents.y), max(exponents.z, exponents.w));
}

// Brings values of this exponent, in place, to [2^13, 2^14).
fn scale_of(exponent: u32) -> f32 {
    // A value in [2^e, 2^(e+1)) has exponent bits 127 + e, and 2^(13 - e) has 140 - e.
    return bitcast<f32>(u32(clamp(267 - i32(exponent >> 23u), 1, 253)) << 23u);
}

// 1 / |s| of a power of two, exactly.
fn inverse_of(scale: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - (bitcast<u32>(scale) & 0x7fffffffu));
}

// What f16 does not hold of a mantissa.
const LOW_BITS: u32 = 0x1fffu;

// The upper 11 bits of the mantissa, which f16 holds. By mask: f32(f16(v)) is folded away.
fn high_part(value: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(value) & vec4<u32>(~LOW_BITS));
}
