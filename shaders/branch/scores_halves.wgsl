// branch/scores.wgsl for features of 16 bits on matrix units, in one product of halves: scores are good to 2e-3 of
// themselves, or 1e-6.
//
//   F0: tokens × width in f16 or bf16; width a multiple of 8    stats: parts × branches × tokens × STATE vec4
//
// Each lane has a token and walks its channels, 16 at a time, for two branches, which have the weights e^(a - m) in
// common. It sums those, and times d and φ(d), d = u - r, with the mean of the first block for r. What strays far from m
// and r is merged as branch/shared/state.wgsl does it.
//
// Grid: (token tile, pair of branches, part of the channels). Bindings: 5 F0, 6 controls, 7 stats; see
// branch/shared/block.wgsl. The permutation sets SCORE, DTYPE and DEPTH.

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
// How far the mean may stray from r, for e^(r - mean) to keep its digits.
const DRIFT: f32 = 2.0;
// The largest exponent that need not be kept apart.
const LARGE: f32 = 30.0;

// Sums of a branch over some channels, with e^(a - m) for weights: of d, and of φ(d)·e^-g.
// For `dot` and `energy` Σ f0·u and Σ u² in d and s.
struct Sums {
    r: f32,
    d: f32,
    s: f32,
    g: f32,
}

// 16 channels of a token: its features, and their weights. For `dot` and `energy` the features are in their place.
struct Block {
    low: vec4<u32>,
    high: vec4<u32>,
    e0: vec4<f32>,
    e1: vec4<f32>,
    e2: vec4<f32>,
    e3: vec4<f32>,
}

var<private> temperature: f32;

// φ(d)
fn phi(d: vec4<f32>) -> vec4<f32> {
    let q = d * d;
    var p = fma(d, vec4<f32>(1.0 / 120.0), vec4<f32>(1.0 / 24.0));
    p = fma(p, d, vec4<f32>(1.0 / 6.0));
    p = fma(p, d, vec4<f32>(0.5));
    let small = q * p;
    if (max4(q) <= NEAR * NEAR) {
        return small;
    }
    return select(exp2(d * LOG2_E) - (1.0 + d), small, q <= vec4<f32>(NEAR * NEAR));
}

fn absolute(u0: vec4<f32>, u1: vec4<f32>, u2: vec4<f32>, u3: vec4<f32>) -> f32 {
    return max4(max(max(abs(u0), abs(u1)), max(abs(u2), abs(u3))));
}

fn total(e: Block, u0: vec4<f32>, u1: vec4<f32>, u2: vec4<f32>, u3: vec4<f32>) -> f32 {
    return sum4(fma(e.e0, u0, e.e1 * u1) + fma(e.e2, u2, e.e3 * u3));
}

// The sums with weights `w` in all, relative to 2^m, as a state. Σ w·φ(u - c) = e^-h·(Σ w·φ(u - r) - φ(h)·Σ w), h = c - r.
fn state(x: Sums, m: f32, w: f32) -> State {
    if (SCORE != KL) {
        return State(w, x.d, x.s, 0.0, 0.0);
    }
    if (w == 0.0) {
        return empty_state();
    }
    let h = x.d / w;
    let s = exp4(vec4<f32>(-h)).x * (x.s - w * phi(vec4<f32>(h)).x);
    return State(m * LN_2, w, x.r + h, max(s, 0.0), x.g);
}

// Sums about the mean of a state.
fn centred(x: State) -> Sums {
    let is_apart = x.g > LARGE;
    let s = select(x.s * exp4(vec4<f32>(x.g)).x, x.s, is_apart);
    return Sums(x.c, 0.0, s, select(0.0, x.g, is_apart));
}

// Adds a block; `m`, `w`: the largest a, in powers of two, and the weights so far, in relation to it.
fn absorb(old: Sums, e: Block, m: f32, w: f32, factor: f32) -> Sums {
    var x = old;
    let at = subgroup * OUT_LEN + lane * OUT_STRIDE;
    let u0 = sums[at] * factor;
    let u1 = sums[at + 1u] * factor;
    let u2 = sums[at + 2u] * factor;
    let u3 = sums[at + 3u] * factor;
    if (SCORE != KL) {
        x.d += total(e, u0, u1, u2, u3);
        x.s += sum4(fma(u0, u0, u1 * u1) + fma(u2, u2, u3 * u3));
        return x;
    }
    let own = sum4((e.e0 + e.e1) + (e.e2 + e.e3));
    if (w == 0.0 && own > 0.0) {
        x.r = total(e, u0, u1, u2, u3) / own;
    }
    let d0 = u0 - x.r;
    let d1 = u1 - x.r;
    let d2 = u2 - x.r;
    let d3 = u3 - x.r;
    if (absolute(d0, d1, d2, d3) <= FAR && x.g == 0.0) {
        x.d += total(e, d0, d1, d2, d3);
        x.s += total(e, phi(d0), phi(d1), phi(d2), phi(d3));
        if (abs(x.d) <= DRIFT * (w + own)) {
            return x;
        }
        return centred(state(x, m, w + own));
    }
    let a0 = max(widened(e.low.xy) * temperature, vec4<f32>(LOWEST));
    let a1 = max(widened(e.low.zw) * temperature, vec4<f32>(LOWEST));
    let a2 = max(widened(e.high.xy) * temperature, vec4<f32>(LOWEST));
    let a3 = max(widened(e.high.zw) * temperature, vec4<f32>(LOWEST));
    let block = merge_states(state_of(a0, a1, u0, u1), state_of(a2, a3, u2, u3));
    return centred(merge_states(state(x, m, w), block));
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
    stage_z(job, first, middle, first_token, 0u, 0u);
    stage_z(job, middle, end, first_token, middle - first, TOKENS);
    workgroupBarrier();
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
        var e = Block(low, select(nowhere, high, channel + 8u < job.width), vec4<f32>(), vec4<f32>(), vec4<f32>(), vec4<f32>());
        // The next block is on its way while this one is at work.
        next = channel + SUBGROUPS * CHANNELS;
        low = f0[place + min(next, job.width - 8u) / 8u];
        high = f0[place + min(next + 8u, job.width - 8u) / 8u];
        e.e0 = widened(e.low.xy);
        e.e1 = widened(e.low.zw);
        e.e2 = widened(e.high.xy);
        e.e3 = widened(e.high.zw);
        var weights = w;
        if (SCORE == KL) {
            // By the built-in exponential of the difference: it loses digits of large arguments only.
            let most = max(max4(max(max(e.e0, e.e1), max(e.e2, e.e3))) * scale, m);
            let fade = select(1.0, exp2(m - most), inside);
            m = select(m, most, inside);
            weights *= fade;
            x.d *= fade;
            x.s *= fade;
            y.d *= fade;
            y.s *= fade;
            e.e0 = exp2(fma(e.e0, vec4<f32>(scale), vec4<f32>(-m)));
            e.e1 = exp2(fma(e.e1, vec4<f32>(scale), vec4<f32>(-m)));
            e.e2 = exp2(fma(e.e2, vec4<f32>(scale), vec4<f32>(-m)));
            e.e3 = exp2(fma(e.e3, vec4<f32>(scale), vec4<f32>(-m)));
        }
        let block = min(channel, job.width - 1u) / CHANNELS;
        multiply(job, block, first, middle, 0u);
        meet();
        if (inside) {
            x = absorb(x, e, m, weights, factors.x);
        }
        meet();
        multiply(job, block, middle, end, middle - first);
        meet();
        if (inside) {
            y = absorb(y, e, m, weights, factors.y);
            if (SCORE == KL) {
                w = weights + sum4((e.e0 + e.e1) + (e.e2 + e.e3));
            } else {
                w += total(e, e.e0, e.e1, e.e2, e.e3);
            }
        }
        meet();
    }
    finish(job, work, branch, state(x, m, w));
    finish(job, work, branch + 1u, state(y, m, w));
}
