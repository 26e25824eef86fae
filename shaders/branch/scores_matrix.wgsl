// branch/scores.wgsl on matrix units.
//
//   F0: tokens × width in f32, f16 or bf16; width a multiple of 4    stats: parts × branches × tokens × STATE vec4
//
// A lane sums e^(a - m), and times d and φ(d), d = u - r, for its channels of 4 rows, each with an m and an r that its 8
// lanes have in common: at first the first tile's largest a and mean u. An r near the mean loses no digits: only the
// last step to the mean itself subtracts. A tile for which m and r are no good is merged as branch/shared/state.wgsl does it.
//
// Grid: (token tile, branch, part of the channels). Bindings: 5 F0, 6 controls, 7 stats; see branch/shared/tile_matrix.wgsl.
// The permutation sets SCORE, DTYPE and the tile.

enable f16;

#import shared/words
#import shared/pack
#import shared/halves
#import shared/row_lanes
#import features
#import branch/shared/job
#import branch/shared/split
#import shared/exp_log
#import branch/shared/state

@group(0) @binding(5) var<storage, read> f0: array<Raw>;
@group(0) @binding(6) var<storage, read> controls: Controls;
@group(0) @binding(7) var<storage, read_write> stats: array<vec4<f32>>;

#import branch/shared/tile_matrix
#import multiply

// What weights in relation to m, means in relation to r, and their φ may be, to keep their digits and f32's range.
const HEAVY: f32 = 20.0;
const FAR: f32 = 2.0;
const VAST: f32 = 1e20;
// The largest exponent that need not be kept apart.
const LARGE: f32 = 30.0;

// Sums of a lane over some channels: Σ e^(a - m), and of it times d, and times φ(d)·e^-g.
// For `dot` and `energy` Σ f0², Σ f0·u and Σ u² in w, d and s.
struct Running {
    m: f32,
    r: f32,
    g: f32,
    w: f32,
    d: f32,
    s: f32,
}

var<private> temperature: f32;

// φ(d). Near zero by a polynomial for φ(d) / d², good to 5e-8.
fn phi(d: vec4<f32>) -> vec4<f32> {
    let q = d * d;
    var p = fma(d, vec4<f32>(1.0 / 5040.0), vec4<f32>(1.398189e-3));
    p = fma(p, d, vec4<f32>(1.0 / 120.0));
    p = fma(p, d, vec4<f32>(4.1665795e-2));
    p = fma(p, d, vec4<f32>(1.0 / 6.0));
    p = fma(p, d, vec4<f32>(0.5));
    let small = q * p;
    if (max4(q) <= 0.25) {
        return small;
    }
    return select(exp2(d * LOG2_E) - (1.0 + d), small, q <= vec4<f32>(0.25));
}

// The largest of the 8 lanes of a row.
fn row_max(v: f32) -> f32 {
    var x = max(v, subgroupShuffleXor(v, 1u));
    x = max(x, subgroupShuffleXor(x, 2u));
    return max(x, subgroupShuffleXor(x, 4u));
}

// The sum over the 8 lanes of a row.
fn row_sum(v: f32) -> f32 {
    var x = v + subgroupShuffleXor(v, 1u);
    x += subgroupShuffleXor(x, 2u);
    return x + subgroupShuffleXor(x, 4u);
}

// e^(a - m), by the built-in exponential of the difference: it loses digits of large arguments only.
fn weight(raw: Raw, m: f32) -> vec4<f32> {
    return exp2(fma(widened(raw), vec4<f32>(temperature), vec4<f32>(-m)) * LOG2_E);
}

// Begins sums with the m and r that a row's first tile asks for.
fn begin(part: Part, f: Channels) -> Running {
    let a = max(widened(f.left), widened(f.right)) * temperature;
    let m = max(row_max(max4(a)), LOWEST);
    let x = weight(f.left, m);
    let y = weight(f.right, m);
    let sum = row_sum(sum4(fma(x, left_product(part), y * right_product(part))));
    return Running(m, sum / row_sum(sum4(x + y)), 0.0, 0.0, 0.0, 0.0);
}

// The sums of a tile alone.
fn tile_sums(old: Running, part: Part, f: Channels) -> Running {
    var tile = old;
    if (SCORE == KL) {
        let x = weight(f.left, old.m);
        let y = weight(f.right, old.m);
        let d = left_product(part) - old.r;
        let e = right_product(part) - old.r;
        tile.w = sum4(x + y);
        tile.d = sum4(fma(x, d, y * e));
        tile.s = sum4(fma(x, phi(d), y * phi(e)));
    } else {
        let u = left_product(part);
        let v = right_product(part);
        let a = max(widened(f.left), vec4<f32>(LOWEST));
        let b = max(widened(f.right), vec4<f32>(LOWEST));
        let x = select(a, vec4<f32>(0.0), a == vec4<f32>(LOWEST));
        let y = select(b, vec4<f32>(0.0), b == vec4<f32>(LOWEST));
        tile.w = sum4(fma(x, x, y * y));
        tile.d = sum4(fma(x, u, y * v));
        tile.s = sum4(fma(u, u, v * v));
    }
    return tile;
}

fn is_safe(tile: Running) -> bool {
    return SCORE != KL || (tile.w < HEAVY && abs(tile.d) <= FAR * (1.0 + tile.w) && tile.s < VAST && tile.g == 0.0);
}

fn plus(x: Running, y: Running) -> Running {
    return Running(x.m, x.r, x.g, x.w + y.w, x.d + y.d, x.s + y.s);
}

// The sums of a row as a state. Σ w·φ(u - c) = e^-h·(Σ w·φ(u - r) - φ(h)·Σ w) with h = c - r.
fn state(x: Running) -> State {
    let w = row_sum(x.w);
    let d = row_sum(x.d);
    let s = row_sum(x.s);
    if (SCORE != KL) {
        return State(w, d, s, 0.0, 0.0);
    }
    let h = select(d / w, 0.0, w == 0.0);
    return State(x.m, w, x.r + h, max(exp4(vec4<f32>(-h)).x * (s - w * phi(vec4<f32>(h)).x), 0.0), x.g);
}

// The sums with a tile for which their m and r are no good; the row's first lane then has them all.
fn merged(x: Running, part: Part, f: Channels) -> Running {
    let a = max(widened(f.left) * temperature, vec4<f32>(LOWEST));
    let b = max(widened(f.right) * temperature, vec4<f32>(LOWEST));
    let u = left_product(part);
    let v = right_product(part);
    let m = row_max(max4(max(a, b)));
    let log_a = a - m;
    let log_b = b - m;
    let ea = exp4(log_a);
    let eb = exp4(log_b);
    let w = row_sum(sum4(ea + eb));
    let c = row_sum(sum4(fma(ea, u, eb * v))) / w;
    let du = u - c;
    let dv = v - c;
    let g = max(0.0, row_max(max4(max(log_a + du, log_b + dv))));
    let q = exp4(vec4<f32>(-g)).x;
    let s = row_sum(sum4(excess(ea, log_a, du, g, q) + excess(eb, log_b, dv, g, q)));
    let y = merge_states(state(x), State(m, w, c, s, g));
    let first = lane % 8u == 0u;
    let whole = select(y.s, y.s * exp4(vec4<f32>(y.g)).x, y.g <= LARGE);
    let apart = select(y.g, 0.0, y.g <= LARGE);
    return Running(y.m, y.c, apart, select(0.0, y.w, first), 0.0, select(0.0, whole, first));
}

fn finish(job: Job, work: vec3<u32>, row: u32, x: Running) {
    let y = state(x);
    let token = job.first + work.x * TOKENS + subgroup * 16u + lane / 8u + row;
    if (lane % 8u == 0u && token < job.first + job.count) {
        let place = ((work.z * job.branches + work.y) * job.tokens + token) * STATE;
        stats[place] = vec4<f32>(y.m, y.w, y.c, y.s);
        stats[place + 1u] = vec4<f32>(y.g, 0.0, 0.0, 0.0);
    }
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
    let start = work.z * job.part_width;
    let end = min(start + job.part_width, job.width);
    let first_column = jobs[0].column_starts[work.y];
    let columns = Columns(first_column, jobs[0].column_starts[work.y + 1u] - first_column);
    temperature = select(1.0, controls.inverse_temperature, SCORE == KL);
    let factor = jobs[0].factors[work.y] * controls.strengths[jobs[0].adapters[work.y]] * temperature;
    let factors = stage_z(job, columns, first_token) * factor;
    let part0 = part(job, first_token, 0u, factors.x);
    let part1 = part(job, first_token, 4u, factors.y);
    let part2 = part(job, first_token, 8u, factors.z);
    let part3 = part(job, first_token, 12u, factors.w);
    var x0: Running;
    var x1: Running;
    var x2: Running;
    var x3: Running;
    fetch_b(job, columns, start);
    for (var channel = start; channel < end; channel += CHANNELS) {
        let tile0 = features(job, part0, channel);
        let tile1 = features(job, part1, channel);
        let tile2 = features(job, part2, channel);
        let tile3 = features(job, part3, channel);
        tile_product(job, columns, min(channel + CHANNELS, end - 1u) / CHANNELS * CHANNELS);
        if (SCORE == KL && channel == start) {
            x0 = begin(part0, tile0);
            x1 = begin(part1, tile1);
            x2 = begin(part2, tile2);
            x3 = begin(part3, tile3);
        }
        let y0 = tile_sums(x0, part0, tile0);
        let y1 = tile_sums(x1, part1, tile1);
        let y2 = tile_sums(x2, part2, tile2);
        let y3 = tile_sums(x3, part3, tile3);
        if (subgroupAll(is_safe(y0) && is_safe(y1) && is_safe(y2) && is_safe(y3))) {
            x0 = plus(x0, y0);
            x1 = plus(x1, y1);
            x2 = plus(x2, y2);
            x3 = plus(x3, y3);
        } else {
            x0 = merged(x0, part0, tile0);
            x1 = merged(x1, part1, tile1);
            x2 = merged(x2, part2, tile2);
            x3 = merged(x3, part3, tile3);
        }
    }
    finish(job, work, 0u, x0);
    finish(job, work, 4u, x1);
    finish(job, work, 8u, x2);
    finish(job, work, 12u, x3);
}
