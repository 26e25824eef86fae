// The sum of the terms' gradients. What gradient_norm.wgsl and gradient_step.wgsl have in common.

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

// What the norm of a gradient is that is not finite.
const BAD: f32 = 3.0e38;

fn gradient(job: Job, e: u32) -> f32 {
    var g = gradients[e];
    for (var term = 1u; term < job.terms; term++) {
        g += gradients[term * job.samples * job.len + e];
    }
    return g;
}
