// Exponential and logarithm of f32: built-in ones are off by 3e-6 and differ between drivers.

const LOG2_E: f32 = 1.44269504;
// ln 2 as a part of few bits, whose small multiples are exact, and the rest.
const LN_2_HIGH: f32 = 0.693145751953125;
const LN_2_LOW: f32 = 1.42860677e-6;

// e^x to 3e-7; 0 below -86, and e^88 above 88.
fn exp4(x: vec4<f32>) -> vec4<f32> {
    let y = clamp(x, vec4<f32>(-86.0), vec4<f32>(88.0));
    let n = round(y * LOG2_E);
    let r = fma(n, vec4<f32>(-LN_2_LOW), fma(n, vec4<f32>(-LN_2_HIGH), y));
    var p = fma(r, vec4<f32>(1.0 / 5040.0), vec4<f32>(1.0 / 720.0));
    p = fma(p, r, vec4<f32>(1.0 / 120.0));
    p = fma(p, r, vec4<f32>(1.0 / 24.0));
    p = fma(p, r, vec4<f32>(1.0 / 6.0));
    p = fma(p, r, vec4<f32>(0.5));
    p = fma(p, r, vec4<f32>(1.0));
    p = fma(p, r, vec4<f32>(1.0));
    let power = bitcast<vec4<f32>>(bitcast<vec4<i32>>(p) + (vec4<i32>(n) << vec4<u32>(23u)));
    return select(power, vec4<f32>(0.0), x < vec4<f32>(-86.0));
}

// 2·artanh(s) for |s| <= 0.21
fn twice_artanh(s: f32) -> f32 {
    let q = s * s;
    var p = fma(q, 1.0 / 11.0, 1.0 / 9.0);
    p = fma(p, q, 1.0 / 7.0);
    p = fma(p, q, 1.0 / 5.0);
    p = fma(p, q, 1.0 / 3.0);
    p = fma(p, q, 1.0);
    return 2.0 * s * p;
}

// ln x of a normal x > 0
fn log1(x: f32) -> f32 {
    var bits = bitcast<u32>(x);
    var exponent = f32(i32(bits >> 23u) - 127);
    var f = bitcast<f32>((bits & 0x7fffffu) | 0x3f800000u);
    if (f > 1.41421356) {
        f *= 0.5;
        exponent += 1.0;
    }
    let log_f = twice_artanh((f - 1.0) / (f + 1.0));
    return fma(exponent, LN_2_HIGH, fma(exponent, LN_2_LOW, log_f));
}

// ln(1 + v) for v >= 0, exact in relation to v
fn log1p(v: f32) -> f32 {
    if (v < 0.5) {
        return twice_artanh(v / (2.0 + v));
    }
    return log1(1.0 + v);
}
