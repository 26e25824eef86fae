// A tile of Z·B_catᵀ in registers: 64 tokens × 128 channels over 256 threads, each 4 tokens × 8 channels.
// The kernel declares factors (vec4), gives the elements of Z, and has `run` for an entry point;
// branch/shared/tile_matrix.wgsl serves matrix units.

const TOKENS: u32 = 64u;
const CHANNELS: u32 = 128u;
const DEPTH: u32 = 16u;
const THREADS: u32 = 256u;
const Z_QUADS: u32 = TOKENS / 4u;
const B_QUADS: u32 = CHANNELS / 4u;

// [k][token / 4], XORed with k so that the threads that store the 16 values of k do not meet in a bank.
var<workgroup> z_tile: array<vec4<f32>, DEPTH * Z_QUADS>;
// [k][channel / 4]; between products, what threads tell each other.
var<workgroup> exchange: array<vec4<f32>, DEPTH * B_QUADS>;

// ci has 4 channels of token i of the quad, from left_channel on, and di those from right_channel on.
var<private> c0: vec4<f32>;
var<private> c1: vec4<f32>;
var<private> c2: vec4<f32>;
var<private> c3: vec4<f32>;
var<private> d0: vec4<f32>;
var<private> d1: vec4<f32>;
var<private> d2: vec4<f32>;
var<private> d3: vec4<f32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    run(work, t);
}

fn token_quad(t: u32) -> u32 {
    return t / 16u;
}

fn channel_quad(t: u32) -> u32 {
    return t % 16u;
}

fn left_channel(t: u32) -> u32 {
    return channel_quad(t) * 4u;
}

fn right_channel(t: u32) -> u32 {
    return channel_quad(t) * 4u + CHANNELS / 2u;
}

// C = Z[tokens, start .. end]·B_cat[channels, start .. end]ᵀ. Every thread calls it.
fn tile_product(job: Job, first_token: u32, first_channel: u32, start: u32, end: u32, t: u32) {
    clear_tile();
    for (var k = start; k < end; k += DEPTH) {
        add_product(job, first_token, first_channel, k, end, t);
    }
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

// C += Z[tokens, k .. end]·B_cat[channels, k .. end]ᵀ for at most DEPTH columns.
fn add_product(job: Job, first_token: u32, first_channel: u32, k: u32, end: u32, t: u32) {
    workgroupBarrier();
    let zk = t % DEPTH;
    let zq = t / DEPTH;
    var values = vec4<f32>(0.0);
    if (k + zk < end) {
        let token = first_token + zq * 4u;
        values = vec4<f32>(
            z_value(job, token, k + zk),
            z_value(job, token + 1u, k + zk),
            z_value(job, token + 2u, k + zk),
            z_value(job, token + 3u, k + zk),
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
        exchange[e] = b;
    }
    workgroupBarrier();
    let tokens = token_quad(t);
    let channels = channel_quad(t);
    for (var d = 0u; d < DEPTH; d++) {
        let z4 = z_tile[d * Z_QUADS + (tokens ^ d)];
        let left = exchange[d * B_QUADS + channels];
        let right = exchange[d * B_QUADS + B_QUADS / 2u + channels];
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
