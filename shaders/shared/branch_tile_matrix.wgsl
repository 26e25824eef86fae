// branch_tile.wgsl on matrix units, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32.
//
// Z is brought into f16's range by a power of two for each token, B_cat lies there already; both are split by
// mask into a high and a low part of 11 bits each, and the products of two low parts left out. The unit's
// accumulator truncates, which over a rank of 256 at most stays within f32's accuracy.

const TOKENS: u32 = 64u;
const CHANNELS: u32 = 128u;
const DEPTH: u32 = 16u;
const THREADS: u32 = 256u;
// Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const Z_STRIDE: u32 = DEPTH + 8u;
const B_STRIDE: u32 = CHANNELS + 8u;
// B_cat's largest value is in [1, 2): up from f16's subnormal numbers.
const B_SCALE: f32 = 4096.0;

// One array, so that every part of it lies on 16 bytes.
const Z_HIGH: u32 = 0u;
const Z_LOW: u32 = Z_HIGH + TOKENS * Z_STRIDE;
const B_HIGH: u32 = Z_LOW + TOKENS * Z_STRIDE;
const B_LOW: u32 = B_HIGH + DEPTH * B_STRIDE;
const HALVES: u32 = B_LOW + DEPTH * B_STRIDE;
var<workgroup> halves: array<f16, HALVES>;
// 16 tokens × 32 channels of each subgroup on their way out.
var<workgroup> patches: array<f32, 4096>;
// What threads tell each other, of whatever kernel.
var<workgroup> exchange: array<vec4<f32>, TOKENS * 8u>;
// 2^n by which the token's Z is multiplied.
var<workgroup> scales: array<f32, TOKENS>;

var<private> subgroup: u32;
var<private> lane: u32;

// As in branch_tile.wgsl.
var<private> c0: vec4<f32>;
var<private> c1: vec4<f32>;
var<private> c2: vec4<f32>;
var<private> c3: vec4<f32>;
var<private> d0: vec4<f32>;
var<private> d1: vec4<f32>;
var<private> d2: vec4<f32>;
var<private> d3: vec4<f32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) work: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    subgroup = subgroup_id;
    lane = subgroup_lane;
    run(work, t);
}

// A subgroup has 16 tokens × 64 channels.
fn token_quad(t: u32) -> u32 {
    return subgroup / 2u * 4u + lane / 8u;
}

fn channel_quad(t: u32) -> u32 {
    return subgroup % 2u * 8u + lane % 8u;
}

fn left_channel(t: u32) -> u32 {
    return subgroup % 2u * 64u + lane % 8u * 4u;
}

fn right_channel(t: u32) -> u32 {
    return left_channel(t) + 32u;
}

// The exponent bits; 0 for what is not finite.
fn exponent(value: f32) -> u32 {
    let bits = (bitcast<u32>(value) >> 23u) & 0xffu;
    return select(bits, 0u, bits == 0xffu);
}

// Finds the scales of Z[tokens, start .. end]. Every thread calls it, before products of these.
fn prepare(job: Job, first_token: u32, start: u32, end: u32, t: u32) {
    let token = t % TOKENS;
    var most = 0u;
    for (var k = start + t / TOKENS; k < end; k += THREADS / TOKENS) {
        most = max(most, exponent(z_value(job, first_token + token, k)));
    }
    workgroupBarrier();
    exchange[t] = vec4<f32>(f32(most), 0.0, 0.0, 0.0);
    workgroupBarrier();
    if (t < TOKENS) {
        let both = max(
            max(exchange[t].x, exchange[t + TOKENS].x),
            max(exchange[t + 2u * TOKENS].x, exchange[t + 3u * TOKENS].x),
        );
        // A value in [2^e, 2^(e+1)) has exponent bits 127 + e, and 2^(13 - e) has 140 - e.
        let bits = clamp(267 - i32(both), 1, 253);
        scales[t] = select(bitcast<f32>(u32(bits) << 23u), 1.0, both == 0.0);
    }
    workgroupBarrier();
}

// 1 / s of a power of two, exactly.
fn inverse_power(s: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - bitcast<u32>(s));
}

fn put(high: u32, low: u32, value: f32) {
    let upper = bitcast<f32>(bitcast<u32>(value) & 0xffffe000u);
    halves[high] = f16(upper);
    halves[low] = f16(value - upper);
}

// Stages Z[tokens, k .. end] and B_cat[channels, k .. end].
fn stage(job: Job, first_token: u32, first_channel: u32, k: u32, end: u32, t: u32) {
    let zk = t % DEPTH;
    for (var i = 0u; i < 4u; i++) {
        let token = t / DEPTH + i * (THREADS / DEPTH);
        var value = 0.0;
        if (k + zk < end) {
            value = z_value(job, first_token + token, k + zk) * scales[token];
        }
        let place = token * Z_STRIDE + zk;
        put(Z_HIGH + place, Z_LOW + place, value);
    }
    for (var i = 0u; i < 2u; i++) {
        let e = t + i * THREADS;
        let row = e / (CHANNELS / 4u);
        let quad = e % (CHANNELS / 4u);
        var b = vec4<f32>(0.0);
        if (k + row < end && first_channel / 4u + quad < job.stride) {
            b = factors[job.b + (k + row) * job.stride + first_channel / 4u + quad] * B_SCALE;
        }
        let place = row * B_STRIDE + quad * 4u;
        put(B_HIGH + place, B_LOW + place, b.x);
        put(B_HIGH + place + 1u, B_LOW + place + 1u, b.y);
        put(B_HIGH + place + 2u, B_LOW + place + 2u, b.z);
        put(B_HIGH + place + 3u, B_LOW + place + 3u, b.w);
    }
}

// Token i of this thread's quad, from the patch of its subgroup.
fn patch_row(i: u32) -> vec4<f32> {
    let row = lane / 8u * 4u + i;
    let e = subgroup * 512u + row * 32u + lane % 8u * 4u;
    let scale = inverse_power(scales[subgroup / 2u * 16u + row]) * (1.0 / B_SCALE);
    return vec4<f32>(patches[e], patches[e + 1u], patches[e + 2u], patches[e + 3u]) * scale;
}

// C = Z[tokens, start .. end]·B_cat[channels, start .. end]ᵀ. Every thread calls it.
fn tile_product(job: Job, first_token: u32, first_channel: u32, start: u32, end: u32, t: u32) {
    var sum0: coop_mat16x16<f32, C>;
    var sum1: coop_mat16x16<f32, C>;
    var sum2: coop_mat16x16<f32, C>;
    var sum3: coop_mat16x16<f32, C>;
    let z_stride = Z_STRIDE;
    let b_stride = B_STRIDE;
    let z_high_at = Z_HIGH + subgroup / 2u * 16u * Z_STRIDE;
    let z_low_at = Z_LOW + subgroup / 2u * 16u * Z_STRIDE;
    let b_high0_at = B_HIGH + subgroup % 2u * 64u;
    let b_high1_at = b_high0_at + 16u;
    let b_high2_at = b_high0_at + 32u;
    let b_high3_at = b_high0_at + 48u;
    let b_low0_at = B_LOW + subgroup % 2u * 64u;
    let b_low1_at = b_low0_at + 16u;
    let b_low2_at = b_low0_at + 32u;
    let b_low3_at = b_low0_at + 48u;
    for (var k = start; k < end; k += DEPTH) {
        workgroupBarrier();
        stage(job, first_token, first_channel, k, end, t);
        workgroupBarrier();
        let z_high = coopLoadT<coop_mat16x16<f16, A>>(&halves[z_high_at], z_stride);
        let z_low = coopLoadT<coop_mat16x16<f16, A>>(&halves[z_low_at], z_stride);
        let high0 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_high0_at], b_stride);
        let high1 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_high1_at], b_stride);
        let high2 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_high2_at], b_stride);
        let high3 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_high3_at], b_stride);
        let low0 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_low0_at], b_stride);
        let low1 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_low1_at], b_stride);
        let low2 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_low2_at], b_stride);
        let low3 = coopLoadT<coop_mat16x16<f16, B>>(&halves[b_low3_at], b_stride);
        // Small terms first.
        sum0 = coopMultiplyAdd(z_low, high0, sum0);
        sum1 = coopMultiplyAdd(z_low, high1, sum1);
        sum2 = coopMultiplyAdd(z_low, high2, sum2);
        sum3 = coopMultiplyAdd(z_low, high3, sum3);
        sum0 = coopMultiplyAdd(z_high, low0, sum0);
        sum1 = coopMultiplyAdd(z_high, low1, sum1);
        sum2 = coopMultiplyAdd(z_high, low2, sum2);
        sum3 = coopMultiplyAdd(z_high, low3, sum3);
        sum0 = coopMultiplyAdd(z_high, high0, sum0);
        sum1 = coopMultiplyAdd(z_high, high1, sum1);
        sum2 = coopMultiplyAdd(z_high, high2, sum2);
        sum3 = coopMultiplyAdd(z_high, high3, sum3);
    }
    let patch0 = subgroup * 512u;
    let patch1 = patch0 + 16u;
    let patch_stride = 32u;
    workgroupBarrier();
    coopStoreT(sum0, &patches[patch0], patch_stride);
    coopStoreT(sum1, &patches[patch1], patch_stride);
    workgroupBarrier();
    c0 = patch_row(0u);
    c1 = patch_row(1u);
    c2 = patch_row(2u);
    c3 = patch_row(3u);
    workgroupBarrier();
    coopStoreT(sum2, &patches[patch0], patch_stride);
    coopStoreT(sum3, &patches[patch1], patch_stride);
    workgroupBarrier();
    d0 = patch_row(0u);
    d1 = patch_row(1u);
    d2 = patch_row(2u);
    d3 = patch_row(3u);
}
