// Adds the parts that a product was split into, in their order, into the first one.
//
//   Z_0 += Z_1 + … + Z_(parts-1)        each `len` elements after the one before, f32
//
// Work: (job, first element). Each workgroup handles CHUNK elements. Bindings: 3 Z.

#import params

struct Job {
    z: u32,     // first element of part 0
    len: u32,
    parts: u32,
}

@group(0) @binding(3) var<storage, read_write> z: array<f32>;

const CHUNK: u32 = 1024u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let end = min(work.y + CHUNK, job.len);
    for (var e = work.y + t; e < end; e += 256u) {
        var place = job.z + e;
        var sum = z[place];
        for (var part = 1u; part < job.parts; part++) {
            place += job.len;
            sum += z[place];
        }
        z[job.z + e] = sum;
    }
}
