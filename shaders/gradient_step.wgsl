// A step down the sum of gradients, in place: x -= clamp(rate·g / rms(g), ±limit), or without `/ rms(g)`.
//
//   x: samples × len, f32      gradients: terms × samples × len      norms: of gradient_norm.wgsl
//
// A sample whose gradient is all zero, or at one place not finite, stays. rms: samples; 0 or -1 for those.
// Grid: (chunk of 1024 elements, sample). Bindings: 3 gradients, 4 norms, 5 x, 6 rms.

struct Job {
    samples: u32,
    len: u32,
    terms: u32,
    parts: u32,
    part_len: u32,
    normalise: u32,
    rate: f32,
    limit: f32,
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(3) var<storage, read> gradients: array<f32>;
@group(0) @binding(4) var<storage, read> norms: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> x: array<f32>;
@group(0) @binding(6) var<storage, read_write> rms: array<f32>;

const CHUNK: u32 = 1024u;
// What gradient_norm.wgsl writes for a gradient that is not finite.
const BAD: f32 = 3.0e38;

fn gradient(job: Job, e: u32) -> f32 {
    var g = gradients[e];
    for (var term = 1u; term < job.terms; term++) {
        g += gradients[term * job.samples * job.len + e];
    }
    return g;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    var most = 0.0;
    for (var part = 0u; part < job.parts; part++) {
        most = max(most, norms[work.y * job.parts + part].x);
    }
    var sum = 0.0;
    for (var part = 0u; part < job.parts; part++) {
        let norm = norms[work.y * job.parts + part];
        let ratio = norm.x / select(1.0, most, most > 0.0);
        sum += norm.y * ratio * ratio;
    }
    let mean = sqrt(sum / f32(job.len));
    let stays = most == 0.0 || most >= BAD;
    if (work.x == 0u && t == 0u) {
        rms[work.y] = select(most * mean, -1.0, most >= BAD);
    }
    if (stays) {
        return;
    }
    let first = work.y * job.len;
    let end = min((work.x + 1u) * CHUNK, job.len);
    for (var i = work.x * CHUNK + t; i < end; i += 256u) {
        let g = gradient(job, first + i);
        var step = job.rate * g;
        if (job.normalise != 0u) {
            step = job.rate * (g / most / mean);
        }
        x[first + i] -= clamp(step, -job.limit, job.limit);
    }
}
