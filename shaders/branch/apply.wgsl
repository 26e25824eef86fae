// F0 += Z·B_catᵀ, in place, rounded once to the type of F0; branch/choose.wgsl has weighed Z.
//
//   F0: tokens × width in f32, f16 or bf16    Z: tokens × rank, f32    B_catᵀ: rank × width (padded), f32
//
// Grid: (channel tile, token tile). Bindings: 3 factors, 4 Z, 5 F0 as raw words.
// The permutation sets DTYPE and the tile.

#import shared/words
#import shared/pack
#import branch/shared/job

@group(0) @binding(3) var<storage, read> factors: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> z: array<f32>;
@group(0) @binding(5) var<storage, read_write> f0_words: array<u32>;

fn z_value(job: Job, token: u32, k: u32) -> f32 {
    if (token >= job.tokens) {
        return 0.0;
    }
    return z[token * job.rank + k];
}

#import branch/shared/features
#import branch/shared/tile

fn store(job: Job, token: u32, channel: u32, f: vec4<f32>) {
    if (token >= job.first + job.count || channel >= job.width) {
        return;
    }
    let e = (token - job.first) * job.width + channel;
    if (DTYPE == F32) {
        let w = job.f0 + e;
        f0_words[w] = bitcast<u32>(f.x);
        if (channel + 1u < job.width) { f0_words[w + 1u] = bitcast<u32>(f.y); }
        if (channel + 2u < job.width) { f0_words[w + 2u] = bitcast<u32>(f.z); }
        if (channel + 3u < job.width) { f0_words[w + 3u] = bitcast<u32>(f.w); }
    } else {
        let w = job.f0 + e / 2u;
        f0_words[w] = pack_halves(f.xy, DTYPE);
        if (channel + 2u < job.width) { f0_words[w + 1u] = pack_halves(f.zw, DTYPE); }
    }
}

fn run(work: vec3<u32>, t: u32) {
    let job = jobs[0];
    let first_token = job.first + work.y * TOKENS;
    let first_channel = work.x * CHANNELS;
    let token = first_token + token_quad(t) * 4u;
    let left = first_channel + left_channel(t);
    let right = first_channel + right_channel(t);
    let a0 = features(job, token, left, 0.0);
    let a1 = features(job, token + 1u, left, 0.0);
    let a2 = features(job, token + 2u, left, 0.0);
    let a3 = features(job, token + 3u, left, 0.0);
    let b0 = features(job, token, right, 0.0);
    let b1 = features(job, token + 1u, right, 0.0);
    let b2 = features(job, token + 2u, right, 0.0);
    let b3 = features(job, token + 3u, right, 0.0);
    tile_product(job, first_token, first_channel, 0u, job.rank, t);
    store(job, token, left, a0 + c0);
    store(job, token + 1u, left, a1 + c1);
    store(job, token + 2u, left, a2 + c2);
    store(job, token + 3u, left, a3 + c3);
    store(job, token, right, b0 + d0);
    store(job, token + 1u, right, b1 + d1);
    store(job, token + 2u, right, b2 + d2);
    store(job, token + 3u, right, b3 + d3);
}
