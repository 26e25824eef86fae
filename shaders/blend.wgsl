// Rows of A between those of two merges: out = strength·(a + t·(b - a)), f32.
//
// Work: (job, first element). Each workgroup handles CHUNK elements. Bindings: 3 a and b, 4 out, 5 controls:
// (t, strength) of each adapter.

#import shared/params

struct Job {
    a: u32,     // first element
    b: u32,     // first element
    out: u32,   // first element
    len: u32,
    adapter: u32,
}

@group(0) @binding(3) var<storage, read> ends: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read> controls: array<vec2<f32>>;

const CHUNK: u32 = 4096u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let control = controls[job.adapter];
    let end = min(work.y + CHUNK, job.len);
    for (var e = work.y + t; e < end; e += 256u) {
        let a = ends[job.a + e];
        out[job.out + e] = control.y * fma(control.x, ends[job.b + e] - a, a);
    }
}
