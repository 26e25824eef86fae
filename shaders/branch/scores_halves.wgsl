// branch/scores.wgsl for features of 16 bits on matrix units, in one product of halves: scores are good to 2e-3 of
// themselves, or 1e-6.
//
//   F0: tokens × width in f16 or bf16; width a multiple of 8    stats: parts × branches × tokens × STATE vec4
//
// Each lane has a token and walks its channels, 16 at a time, for two branches, which have the weights e^(a - m) in
// common. It sums those, and times d and φ(d), d = u - r, with an r near the mean, which moves when the mean strays. A few
// registers hold all of that: more would keep other subgroups out.
//
// Grid: (token tile, pair of branches, part of the channels). Bindings: 5 F0, 6 controls, 7 stats; see
// branch/shared/block.wgsl. The permutation sets SCORE and DTYPE.

enable f16;

#import shared/words
#import shared/pack
#import shared/halves
#import shared/row_lanes
#import branch/shared/features_halves
#import branch/shared/job
#import branch/shared/split
#import shared/exp_log
#import branch/shared/state

@group(0) @binding(5) var<storage, read> f0: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> controls: Controls;
@group(0) @binding(7) var<storage, read_write> stats: array<vec4<f32>>;

#import branch/shared/block
#import multiply

const LN_2: f32 = 0.69314718;

// Of d: up to where φ's series of 4 terms is good to 2e-4, and up to where e^d needs no exponent of its own.
const NEAR: f32 = 0.5;
const FAR: f32 = 20.0;
// How far the mean may stray from r.
const DRIFT: f32 = 2.0;

// Sums of a branch over some channels, with e^(a - m) for weights: of d, and of φ(d); b·e^g is the sum of e^d that φ leaves
// out where d is far. For `dot` and `energy` Σ f0·u and Σ u² in d and s.
struct Sums {
    r: f32,
    d: f32,
    s: f32,
    b: f32,
    g: f32,
}

// The weights of 16 channels of a token, and their sum. For `dot` and `energy` features are in their place.
struct Block {
    e0: vec4<f32>,
    e1: vec4<f32>,
    e2: vec4<f32>,
    e3: vec4<f32>,
    own: f32,
}

var<private> temperature: f32;

// φ(d) of a d that is near.
fn phi_near(d: vec4<f32>) -> vec4<f32> {
    var p = fma(d, vec4<f32>(1.0 / 120.0), vec4<f32>(1.0 / 24.0));
    p = fma(p, d, vec4<f32>(1.0 / 6.0));
    p = fma(p, d, vec4<f32>(0.5));
    return d * d * p;
}

// φ(d)
fn phi(d: vec4<f32>) -> vec4<f32> {
    return select(exp2(d * LOG2_E) - (1.0 + d), phi_near(d), abs(d) <= vec4<f32>(NEAR));
}

fn total(e: Block, u0: vec4<f32>, u1: vec4<f32>, u2: vec4<f32>, u3: vec4<f32>) -> f32 {
    return sum4(fma(e.e0, u0, e.e1 * u1) + fma(e.e2, u2, e.e3 * u3));
}

// e^x of one value
fn exp1(x: f32) -> f32 {
    return exp4(vec4<f32>(x)).x;
}

// Moves r by h, of sums with weights `w` in all:
// Σ w·φ(d - h) = e^-h·Σ w·φ(d) + φ(-h)·Σ w + (e^-h - 1)·Σ w·d
fn moved(old: Sums, w: f32, h: f32) -> Sums {
    var x = old;
    if (h < -FAR) {
        // What was near is far from there.
        let g = select(0.0, max(x.g, 0.0), x.b > 0.0);
        x.b = x.b * exp1(x.g - g) + (x.s + w + x.d) * exp1(-g);
        x.g = g;
        x.s = w * h - w - x.d;
    } else {
        let e = exp1(-h);
        x.s = e * x.s + w * phi(vec4<f32>(-h)).x + x.d * (e - 1.0);
    }
    x.d -= w * h;
    x.g -= h;
    x.r += h;
    return x;
}

// Adds what is far: e^d of it apart, and the rest of φ. A weight that is zero in f32 may be far enough to count.
fn add_far(old: Sums, e: vec4<f32>, d: vec4<f32>, m: f32, raw: Raw) -> Sums {
    var x = old;
    let is_far = d > vec4<f32>(FAR);
    let logs = select(vec4<f32>(LOWEST), widened(raw) * temperature - m * LN_2 + d, is_far);
    let most = max4(logs);
    let g = select(most, max(x.g, most), x.b > 0.0);
    x.b = x.b * exp1(x.g - g) + sum4(select(vec4<f32>(0.0), exp4(logs - g), is_far));
    x.g = g;
    x.s += sum4(e * select(phi(min(d, vec4<f32>(FAR))), -1.0 - d, is_far));
    return x;
}

// The second half of a block of features. Channels that are not there weigh nothing.
fn second(place: u32, has_second: bool) -> vec4<u32> {
    if (has_second) {
        return f0[place + 1u];
    }
    return vec4<u32>(NOWHERE);
}

// Adds a block, which begins at `place` of F0; `m`: the largest a, in powers of two; `w`: the weights so far.
fn absorb(old: Sums, e: Block, m: f32, w: f32, factor: f32, place: u32, has_second: bool) -> Sums {
    var x = old;
    let at = subgroup * OUT_LEN + lane * OUT_STRIDE;
    var d0 = fma(sums[at], vec4<f32>(factor), vec4<f32>(-x.r));
    var d1 = fma(sums[at + 1u], vec4<f32>(factor), vec4<f32>(-x.r));
    var d2 = fma(sums[at + 2u], vec4<f32>(factor), vec4<f32>(-x.r));
    var d3 = fma(sums[at + 3u], vec4<f32>(factor), vec4<f32>(-x.r));
    let d = total(e, d0, d1, d2, d3);
    if (SCORE != KL) {
        x.d += d;
        x.s += sum4(fma(d0, d0, d1 * d1) + fma(d2, d2, d3 * d3));
        return x;
    }
    let mean = (x.d + d) / (w + e.own);
    if (abs(mean) > DRIFT || w == 0.0) {
        if (w == 0.0) {
            x.r += mean;
        } else {
            x = moved(x, w, mean);
        }
        d0 -= mean;
        d1 -= mean;
        d2 -= mean;
        d3 -= mean;
        x.d = 0.0;
    } else {
        x.d += d;
    }
    if (max4(max(max(abs(d0), abs(d1)), max(abs(d2), abs(d3)))) <= NEAR) {
        x.s += total(e, phi_near(d0), phi_near(d1), phi_near(d2), phi_near(d3));
        return x;
    }
    if (max4(max(max(d0, d1), max(d2, d3))) <= FAR) {
        x.s += total(e, phi(d0), phi(d1), phi(d2), phi(d3));
        return x;
    }
    // Read again, features need no registers meanwhile.
    let left = f0[place];
    let right = second(place, has_second);
    x = add_far(x, e.e0, d0, m, left.xy);
    x = add_far(x, e.e1, d1, m, left.zw);
    x = add_far(x, e.e2, d2, m, right.xy);
    return add_far(x, e.e3, d3, m, right.zw);
}

// The sums with weights `w` in all, relative to 2^m, as a state.
fn state(old: Sums, m: f32, w: f32) -> State {
    if (SCORE != KL) {
        return State(w, old.d, old.s, 0.0, 0.0);
    }
    if (w == 0.0) {
        return empty_state();
    }
    let x = moved(old, w, old.d / w);
    let g = select(0.0, max(x.g, 0.0), x.b > 0.0);
    return State(m * LN_2, w, x.r, max(x.s * exp1(-g) + x.b * exp1(x.g - g), 0.0), g);
}

fn faded(x: Sums, fade: f32) -> Sums {
    return Sums(x.r, x.d * fade, x.s * fade, x.b * fade, x.g);
}

fn together(x: State, y: State) -> State {
    if (SCORE == KL) {
        return merge_states(x, y);
    }
    return State(x.m + y.m, x.w + y.w, x.c + y.c, 0.0, 0.0);
}

// Puts the state of the workgroup's tokens, of which each subgroup has a part, into `stats`. Every thread calls it.
fn finish(job: Job, work: vec3<u32>, branch: u32, x: State) {
    workgroupBarrier();
    sums[2u * t] = vec4<f32>(x.m, x.w, x.c, x.s);
    sums[2u * t + 1u] = vec4<f32>(x.g, 0.0, 0.0, 0.0);
    workgroupBarrier();
    let token = job.first + work.x * TOKENS + t;
    if (t >= TOKENS || token >= job.first + job.count || branch >= job.branches) {
        return;
    }
    var all = x;
    for (var other = 1u; other < SUBGROUPS; other++) {
        let at = 2u * (other * 32u + t);
        let y = sums[at];
        all = together(all, State(y.x, y.y, y.z, y.w, sums[at + 1u].x));
    }
    let place = ((work.z * job.branches + branch) * job.tokens + token) * STATE;
    stats[place] = vec4<f32>(all.m, all.w, all.c, all.s);
    stats[place + 1u] = vec4<f32>(all.g, 0.0, 0.0, 0.0);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) work: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    locate(thread, subgroup_id, subgroup_lane);
    let job = jobs[0];
    let first_token = job.first + work.x * TOKENS;
    let branch = 2u * work.y;
    // Of an odd number the last has no columns.
    let first = jobs[0].column_starts[branch];
    let middle = jobs[0].column_starts[branch + 1u];
    let end = jobs[0].column_starts[min(branch + 2u, job.branches)];
    // Where Z is held, each branch has half of its columns.
    let second_place = select(middle - first, DEPTH / 2u, HELD);
    stage_z(job, first, middle, first_token, 0u, second_place, 0u);
    stage_z(job, middle, end, first_token, second_place, select(end - middle, DEPTH / 2u, HELD), TOKENS);
    workgroupBarrier();
    hold();
    temperature = select(1.0, controls.inverse_temperature, SCORE == KL);
    let one = jobs[0].factors[branch] * controls.strengths[jobs[0].adapters[branch]] * temperature;
    let second = min(branch + 1u, job.branches - 1u);
    let two = jobs[0].factors[second] * controls.strengths[jobs[0].adapters[second]] * temperature;
    let factors = vec2<f32>(one * inverses[lane], two * inverses[TOKENS + lane]);

    let token = min(first_token + lane, job.first + job.count - 1u);
    let place = job.f0 / 4u + (token - job.first) * (job.width / 8u);
    let start = work.z * job.part_width;
    let stop = min(start + job.part_width, job.width);
    // Channels that are not there weigh nothing.
    let nowhere = vec4<u32>(select(0u, NOWHERE, SCORE == KL));
    let scale = temperature * LOG2_E;
    var m = LOWEST;
    var w = 0.0;
    var x: Sums;
    var y: Sums;
    var next = start + subgroup * CHANNELS;
    var low = f0[place + min(next, job.width - 8u) / 8u];
    var high = f0[place + min(next + 8u, job.width - 8u) / 8u];
    for (var base = start; base < stop; base += SUBGROUPS * CHANNELS) {
        let channel = base + subgroup * CHANNELS;
        let inside = channel < stop;
        let right = select(nowhere, high, channel + 8u < job.width);
        var e = Block(widened(low.xy), widened(low.zw), widened(right.xy), widened(right.zw), 0.0);
        // The next block is on its way while this one is at work.
        next = channel + SUBGROUPS * CHANNELS;
        low = f0[place + min(next, job.width - 8u) / 8u];
        high = f0[place + min(next + 8u, job.width - 8u) / 8u];
        var weights = w;
        if (SCORE == KL) {
            // By the built-in exponential of the difference: it loses digits of large arguments only.
            let most = max(max4(max(max(e.e0, e.e1), max(e.e2, e.e3))) * scale, m);
            let fade = select(1.0, exp2(m - most), inside);
            m = select(m, most, inside);
            weights *= fade;
            x = faded(x, fade);
            y = faded(y, fade);
            e.e0 = exp2(fma(e.e0, vec4<f32>(scale), vec4<f32>(-m)));
            e.e1 = exp2(fma(e.e1, vec4<f32>(scale), vec4<f32>(-m)));
            e.e2 = exp2(fma(e.e2, vec4<f32>(scale), vec4<f32>(-m)));
            e.e3 = exp2(fma(e.e3, vec4<f32>(scale), vec4<f32>(-m)));
            e.own = sum4((e.e0 + e.e1) + (e.e2 + e.e3));
        } else {
            e.own = total(e, e.e0, e.e1, e.e2, e.e3);
        }
        let within = min(channel, job.width - 1u);
        multiply_first(job, within, first, middle);
        meet();
        if (inside) {
            x = absorb(x, e, m, weights, factors.x, place + channel / 8u, channel + 8u < job.width);
        }
        meet();
        multiply_second(job, within, middle, end, second_place);
        meet();
        if (inside) {
            y = absorb(y, e, m, weights, factors.y, place + channel / 8u, channel + 8u < job.width);
            w = weights + e.own;
        }
        meet();
    }
    finish(job, work, branch, state(x, m, w));
    finish(job, work, branch + 1u, state(y, m, w));
}
