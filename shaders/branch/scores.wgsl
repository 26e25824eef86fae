// How much each branch would change the features of each token: partial scores over some of the channels.
//
//   F0: tokens × width in f32, f16 or bf16    Z: tokens × rank, f32    B_catᵀ: rank × width (padded), f32
//   stats: parts × branches × tokens × STATE vec4, the states of branch/shared/state.wgsl
//
// Grid: (token tile, branch, part of the channels). Bindings: 3 factors, 4 Z, 5 F0 as raw words, 6 controls,
// 7 stats. The permutation sets SCORE, DTYPE and the tile.

#import shared/words
#import branch/shared/job
#import shared/exp_log
#import branch/shared/state

@group(0) @binding(3) var<storage, read> factors: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> z: array<f32>;
@group(0) @binding(5) var<storage, read> f0_words: array<u32>;
@group(0) @binding(6) var<storage, read> controls: Controls;
@group(0) @binding(7) var<storage, read_write> stats: array<vec4<f32>>;

fn z_value(job: Job, token: u32, k: u32) -> f32 {
    if (token >= job.tokens) {
        return 0.0;
    }
    return z[token * job.rank + k];
}

#import branch/shared/features
#import branch/shared/tile

// Half of the channels' threads hand their states to the other half, through `exchange` and this.
var<workgroup> handed_g: array<f32, TOKENS * 8u>;

fn combine(x: State, y: State) -> State {
    if (SCORE == KL) {
        return merge_states(x, y);
    }
    return State(x.m + y.m, x.w + y.w, x.c + y.c, 0.0, 0.0);
}

fn absorb(x: State, a: vec4<f32>, b: vec4<f32>, u: vec4<f32>, v: vec4<f32>) -> State {
    if (SCORE == KL) {
        return merge_states(x, state_of(a, b, u, v));
    }
    let aa = sum4(fma(a, a, b * b));
    let au = sum4(fma(a, u, b * v));
    let uu = sum4(fma(u, u, v * v));
    return State(x.m + aa, x.w + au, x.c + uu, 0.0, 0.0);
}

// Temperature belongs to distributions only; a channel that is outside stays LOWEST.
fn scaled(a: vec4<f32>, temperature: f32) -> vec4<f32> {
    if (SCORE == KL) {
        return max(a * temperature, vec4<f32>(LOWEST));
    }
    return a;
}

fn hand(slot: u32, x: State) {
    exchange[slot] = vec4<f32>(x.m, x.w, x.c, x.s);
    handed_g[slot] = x.g;
}

fn take(slot: u32) -> State {
    let v = exchange[slot];
    return State(v.x, v.y, v.z, v.w, handed_g[slot]);
}

fn store(job: Job, work: vec3<u32>, token: u32, x: State) {
    if (token < job.first + job.count) {
        let place = ((work.z * job.branches + work.y) * job.tokens + token) * STATE;
        stats[place] = vec4<f32>(x.m, x.w, x.c, x.s);
        stats[place + 1u] = vec4<f32>(x.g, 0.0, 0.0, 0.0);
    }
}

fn run(work: vec3<u32>, t: u32) {
    let job = jobs[0];
    let first_token = job.first + work.x * TOKENS;
    let end = min((work.z + 1u) * job.part_width, job.width);
    let start_k = job.starts[work.y];
    let end_k = job.starts[work.y + 1u];
    let temperature = select(1.0, controls.inverse_temperature, SCORE == KL);
    let factor = job.factors[work.y] * controls.strengths[job.adapters[work.y]] * temperature;
    let outside = select(0.0, LOWEST, SCORE == KL);
    let token = first_token + token_quad(t) * 4u;
    var empty = State(0.0, 0.0, 0.0, 0.0, 0.0);
    if (SCORE == KL) {
        empty = empty_state();
    }
    var s0 = empty;
    var s1 = empty;
    var s2 = empty;
    var s3 = empty;
    for (var channel = work.z * job.part_width; channel < end; channel += CHANNELS) {
        // Fetched before the product, which hides the wait.
        let left = channel + left_channel(t);
        let right = channel + right_channel(t);
        let a0 = features(job, token, left, outside);
        let a1 = features(job, token + 1u, left, outside);
        let a2 = features(job, token + 2u, left, outside);
        let a3 = features(job, token + 3u, left, outside);
        let b0 = features(job, token, right, outside);
        let b1 = features(job, token + 1u, right, outside);
        let b2 = features(job, token + 2u, right, outside);
        let b3 = features(job, token + 3u, right, outside);
        tile_product(job, first_token, channel, start_k, end_k, t);
        s0 = absorb(s0, scaled(a0, temperature), scaled(b0, temperature), c0 * factor, d0 * factor);
        s1 = absorb(s1, scaled(a1, temperature), scaled(b1, temperature), c1 * factor, d1 * factor);
        s2 = absorb(s2, scaled(a2, temperature), scaled(b2, temperature), c2 * factor, d2 * factor);
        s3 = absorb(s3, scaled(a3, temperature), scaled(b3, temperature), c3 * factor, d3 * factor);
    }
    // 16 threads share 4 tokens.
    let place = channel_quad(t);
    for (var half = 8u; half > 0u; half /= 2u) {
        let slot = token_quad(t) * 32u + place % half;
        workgroupBarrier();
        if (place >= half && place < 2u * half) {
            hand(slot, s0);
            hand(slot + 8u, s1);
            hand(slot + 16u, s2);
            hand(slot + 24u, s3);
        }
        workgroupBarrier();
        if (place < half) {
            s0 = combine(s0, take(slot));
            s1 = combine(s1, take(slot + 8u));
            s2 = combine(s2, take(slot + 16u));
            s3 = combine(s3, take(slot + 24u));
        }
    }
    if (place == 0u) {
        store(job, work, token, s0);
        store(job, work, token + 1u, s1);
        store(job, work, token + 2u, s2);
        store(job, work, token + 3u, s3);
    }
}
