// A tile of Z·B_catᵀ in registers: 64 tokens × 128 channels over 256 threads, each 4 tokens × 8 channels.
// The kernel declares factors (vec4) and z, and gives every element of Z its weight.

const TOKENS: u32 = 64u;
const CHANNELS: u32 = 128u;
const DEPTH: u32 = 16u;
const THREADS: u32 = 256u;
const Z_QUADS: u32 = TOKENS / 4u;
const B_QUADS: u32 = CHANNELS / 4u;

// [k][token / 4], XORed with k so that the threads that store the 16 values of k do not meet in a bank.
var<workgroup> z_tile: array<vec4<f32>, DEPTH * Z_QUADS>;
// [k][channel / 4]
var<workgroup> b_tile: array<vec4<f32>, DEPTH * B_QUADS>;

// Of token i: channels channel_quad·4 .. + 4 in ci, the same 64 channels further on in di.
var<private> c0: vec4<f32>;
var<private> c1: vec4<f32>;
var<private> c2: vec4<f32>;
var<private> c3: vec4<f32>;
var<private> d0: vec4<f32>;
var<private> d1: vec4<f32>;
var<private> d2: vec4<f32>;
var<private> d3: vec4<f32>;

fn token_quad(t: u32) -> u32 {
    return t / 16u;
}

fn channel_quad(t: u32) -> u32 {
    return t % 16u;
}

fn clear_tile() {
    c0 = vec4<f32>(0.0);
    c1 = vec4<f32>(0.0);
    c2 = vec4<f32>(0.0);
    c3 = vec4<f32>(0.0);
    d0 = vec4<f32>(0.0);
    d1 = vec4<f32>(0.0);
    d2 = vec4<f32>(0.0);
    d3 = vec4<f32>(0.0);
}

// C += Z[tokens, k .. end]·B_cat[channels, k .. end]ᵀ for at most DEPTH columns. Every thread calls it.
fn add_product(job: Job, first_token: u32, first_channel: u32, k: u32, end: u32, t: u32) {
    workgroupBarrier();
    let zk = t % DEPTH;
    let zq = t / DEPTH;
    var values = vec4<f32>(0.0);
    if (k + zk < end) {
        let token = first_token + zq * 4u;
        values = vec4<f32>(
            weighted_z(job, token, k + zk),
            weighted_z(job, token + 1u, k + zk),
            weighted_z(job, token + 2u, k + zk),
            weighted_z(job, token + 3u, k + zk),
        );
    }
    z_tile[zk * Z_QUADS + (zq ^ zk)] = values;
    for (var i = 0u; i < 2u; i++) {
        let e = t + i * THREADS;
        let bk = k + e / B_QUADS;
        let quad = first_channel / 4u + e % B_QUADS;
        var b = vec4<f32>(0.0);
        if (bk < end && quad < job.stride) {
            b = factors[job.b + bk * job.stride + quad];
        }
        b_tile[e] = b;
    }
    workgroupBarrier();
    let tokens = token_quad(t);
    let channels = channel_quad(t);
    for (var d = 0u; d < DEPTH; d++) {
        let z4 = z_tile[d * Z_QUADS + (tokens ^ d)];
        let left = b_tile[d * B_QUADS + channels];
        let right = b_tile[d * B_QUADS + B_QUADS / 2u + channels];
        c0 = fma(vec4<f32>(z4.x), left, c0);
        c1 = fma(vec4<f32>(z4.y), left, c1);
        c2 = fma(vec4<f32>(z4.z), left, c2);
        c3 = fma(vec4<f32>(z4.w), left, c3);
        d0 = fma(vec4<f32>(z4.x), right, d0);
        d1 = fma(vec4<f32>(z4.y), right, d1);
        d2 = fma(vec4<f32>(z4.z), right, d2);
        d3 = fma(vec4<f32>(z4.w), right, d3);
    }
}

// Channels channel .. + 4 of F0; `outside` beyond its width. A halves' width is even.
fn features(job: Job, token: u32, channel: u32, outside: f32) -> vec4<f32> {
    var f = vec4<f32>(outside);
    if (token >= job.first + job.count || channel >= job.width) {
        return f;
    }
    let e = (token - job.first) * job.width + channel;
    if (DTYPE == F32) {
        let w = job.f0 + e;
        f.x = bitcast<f32>(f0_words[w]);
        if (channel + 1u < job.width) { f.y = bitcast<f32>(f0_words[w + 1u]); }
        if (channel + 2u < job.width) { f.z = bitcast<f32>(f0_words[w + 2u]); }
        if (channel + 3u < job.width) { f.w = bitcast<f32>(f0_words[w + 3u]); }
        return f;
    }
    let w = job.f0 + e / 2u;
    let low = unpack_halves(f0_words[w], DTYPE);
    f.x = low.x;
    f.y = low.y;
    if (channel + 2u < job.width) {
        let high = unpack_halves(f0_words[w + 1u], DTYPE);
        f.z = high.x;
        f.w = high.y;
    }
    return f;
}
