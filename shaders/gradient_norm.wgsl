// Partial norms of the sum of gradients: (largest, Σ (g / largest)²) of each part of each sample.
//
//   gradients: terms × samples × len, f32      norms: samples × parts, vec2
//
// Grid: (part, sample). Bindings: 3 gradients, 4 norms.

struct Job {
    samples: u32,
    len: u32,
    terms: u32,
    parts: u32,
    part_len: u32,
    normalise: u32,     // for gradient_step.wgsl
    rate: f32,
    limit: f32,
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(3) var<storage, read> gradients: array<f32>;
@group(0) @binding(4) var<storage, read_write> norms: array<vec2<f32>>;

var<workgroup> pool: array<f32, 256>;

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
    let first = work.y * job.len + work.x * job.part_len;
    let end = min(first + job.part_len, (work.y + 1u) * job.len);
    var most = 0.0;
    var bad = false;
    for (var e = first + t; e < end; e += 256u) {
        let g = gradient(job, e);
        // NaN is lost in a maximum.
        bad = bad || (bitcast<u32>(g) & 0x7f800000u) == 0x7f800000u;
        most = max(most, abs(g));
    }
    pool[t] = select(most, 3.0e38, bad);
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (t < half) {
            pool[t] = max(pool[t], pool[t + half]);
        }
    }
    workgroupBarrier();
    most = pool[0];
    workgroupBarrier();
    let scale = select(1.0, most, most > 0.0);
    var sum = 0.0;
    for (var e = first + t; e < end; e += 256u) {
        let g = gradient(job, e) / scale;
        sum += g * g;
    }
    pool[t] = sum;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (t < half) {
            pool[t] += pool[t + half];
        }
    }
    if (t == 0u) {
        norms[work.y * job.parts + work.x] = vec2<f32>(most, pool[0]);
    }
}
