// Reading f32, f16 and bf16 values from raw words.

const F32: u32 = 0u;
const F16: u32 = 1u;
const BF16: u32 = 2u;

// The two values of a word of halves, the one at the lower address first.
fn unpack_halves(word: u32, dtype: u32) -> vec2<f32> {
    if (dtype == F16) {
        return unpack2x16float(word);
    }
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}
