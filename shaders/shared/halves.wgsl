// Values as pairs of halves, which matrix units multiply.

enable f16;

#import shared/exponents

struct Halves {
    high: vec4<f16>,
    low: vec4<f16>,
}

// Cuts values in f16's range into a high and a low part of 11 bits each.
fn split(value: vec4<f32>) -> Halves {
    let high = high_part(value);
    return Halves(vec4<f16>(high), vec4<f16>(value - high));
}
