// Double-single arithmetic on pairs of f32, for the host to compare with f64.
//
// Work: (job). Thread t of a workgroup handles pair t. Bindings: 3 pairs, 4 results, RESULTS for each pair:
// a + b and a·b exactly; then a / b, sqrt(b), a + b and a·b of the double-singles (a, a·TINY) and (b, b·TINY).

#import shared/params
#import real

struct Job {
    pairs: u32,
}

const RESULTS: u32 = 6u;
const TINY: f32 = 1.4901161e-8;

@group(0) @binding(3) var<storage, read> pairs: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> results: array<Real>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let job = jobs[work_table[work_index(workgroup)].x];
    for (var e = t; e < job.pairs; e += 64u) {
        let a = pairs[e].x;
        let b = pairs[e].y;
        let wide_a = vec2<f32>(a, a * TINY);
        let wide_b = vec2<f32>(b, b * TINY);
        results[e * RESULTS] = two_sum(a, b);
        results[e * RESULTS + 1u] = two_product(a, b);
        results[e * RESULTS + 2u] = real_div(wide_a, wide_b);
        results[e * RESULTS + 3u] = real_sqrt(wide_b);
        results[e * RESULTS + 4u] = real_add(wide_a, wide_b);
        results[e * RESULTS + 5u] = real_mul(wide_a, wide_b);
    }
}
