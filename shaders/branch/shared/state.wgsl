// Kullback-Leibler divergence of softmax(a) and softmax(a + u) over the channels, in one pass, without
// cancellation. With p = softmax(a) and c = Σ p·u,
//
//   KL = ln Σ p·exp(u) - c = ln(1 + Σ p·φ(u - c))        φ(d) = e^d - 1 - d >= 0
//
// A state holds m = max a, w = Σ e^(a - m), c = Σ e^(a - m)·u / w and s·e^g = Σ e^(a - m)·φ(u - c) over some
// of the channels. Two states merge as means and variances do: since Σ p·(u - c_i) is zero,
// Σ p·φ(u - c) = e^(c_i - c)·Σ p·φ(u - c_i) + Σ p·φ(c_i - c), all of it positive.
// For `dot` and `energy` a state holds Σ f0², Σ f0·u and Σ u² in m, w and c.

// Vectors of a state in the buffer of states.
const STATE: u32 = 2u;

struct State {
    m: f32,
    w: f32,
    c: f32,
    s: f32,
    g: f32,
}

// Stands for the logarithm of zero.
const LOWEST: f32 = -3.0e38;

fn empty_state() -> State {
    return State(LOWEST, 0.0, 0.0, 0.0, 0.0);
}

// weight·e^-g·φ(d), where weight = e^log_weight, q = e^-g
fn excess(weight: vec4<f32>, log_weight: vec4<f32>, d: vec4<f32>, g: f32, q: f32) -> vec4<f32> {
    let scaled = weight * q;
    var p = fma(d, vec4<f32>(1.0 / 40320.0), vec4<f32>(1.0 / 5040.0));
    p = fma(p, d, vec4<f32>(1.0 / 720.0));
    p = fma(p, d, vec4<f32>(1.0 / 120.0));
    p = fma(p, d, vec4<f32>(1.0 / 24.0));
    p = fma(p, d, vec4<f32>(1.0 / 6.0));
    p = fma(p, d, vec4<f32>(0.5));
    let small = scaled * d * d * p;
    let near = abs(d) <= vec4<f32>(0.5);
    if (all(near)) {
        return small;
    }
    let large = exp4(log_weight + d - g) - (1.0 + d) * scaled;
    return select(large, small, near);
}

fn sum4(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

fn max4(v: vec4<f32>) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

// The state of 8 channels; those where a is LOWEST do not count.
fn state_of(a: vec4<f32>, b: vec4<f32>, u: vec4<f32>, v: vec4<f32>) -> State {
    let m = max4(max(a, b));
    if (m == LOWEST) {
        return empty_state();
    }
    let log_a = a - m;
    let log_b = b - m;
    let e = exp4(log_a);
    let f = exp4(log_b);
    let w = sum4(e + f);
    let c = sum4(fma(e, u, f * v)) / w;
    let du = u - c;
    let dv = v - c;
    let g = max(0.0, max4(max(log_a + du, log_b + dv)));
    let q = exp4(vec4<f32>(-g)).x;
    return State(m, w, c, sum4(excess(e, log_a, du, g, q) + excess(f, log_b, dv, g, q)), g);
}

fn merge_states(x: State, y: State) -> State {
    let m = max(x.m, y.m);
    let logs = vec2<f32>(x.m, y.m) - m;
    let weights = exp4(logs.xyxy).xy * vec2<f32>(x.w, y.w);
    let w = weights.x + weights.y;
    if (w == 0.0) {
        return x;
    }
    let c = x.c + (y.c - x.c) * (weights.y / w);
    let d = vec2<f32>(x.c, y.c) - c;
    let shifts = vec2<f32>(x.g, y.g);
    let log_s = logs + d + shifts;
    let g = max(0.0, max(log_s.x, log_s.y));
    let scales = exp4(vec4<f32>(log_s - g, -g, 0.0));
    // exp4(logs) is w's factor and not w's own logarithm: fold that in as a factor.
    let moved = excess(exp4(logs.xyxy), logs.xyxy, d.xyxy, g, scales.z).xy * vec2<f32>(x.w, y.w);
    let s = (x.s * scales.x + y.s * scales.y) + (moved.x + moved.y);
    return State(m, w, c, s, g);
}

fn divergence(x: State) -> f32 {
    let ratio = x.s / x.w;
    if (x.g < 40.0) {
        return log1p(ratio * exp4(vec4<f32>(x.g)).x);
    }
    return x.g + log1(ratio);
}
