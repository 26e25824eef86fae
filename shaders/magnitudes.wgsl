// Counts the magnitudes of the entries of layers' updates, |s_k·B_k·A_k|, by their bits as f32: of each member those of
// the 2^shift · BUCKETS magnitudes from its base on in buckets of 2^shift, and those that are larger in one more.
//
// Work: (job, first row, first column, member). A workgroup counts ROWS × SPAN entries.
// Bindings: 3 A, 4 B, 5 members, 6 counts: BUCKETS + 1 for each member.

#import shared/params
#import real

struct Job {
    a: u32,         // first element
    b: u32,         // first element
    input: u32,     // columns of A
    output: u32,    // rows of B
    rank: u32,      // columns of B
}

@group(0) @binding(3) var<storage, read> a: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read> members: array<Member>;
@group(0) @binding(6) var<storage, read_write> counts: array<atomic<u32>>;

#import shared/entry

const BUCKETS: u32 = 65536u;
const SPAN: u32 = 256u;

// Of the whole workgroup.
var<workgroup> larger: atomic<u32>;

// Counts one entry; gives 1 if it is larger than what has a bucket.
fn count(job: Job, member: Member, slot: u32, row: u32, column: u32, value: Real) -> u32 {
    let bits = bitcast<u32>(real_to_f32(value)) & 0x7fffffffu;
    if (row >= job.output || column >= job.input || bits < member.base) {
        return 0u;
    }
    let bucket = (bits - member.base) >> member.shift;
    if (bucket >= BUCKETS) {
        return 1u;
    }
    atomicAdd(&counts[slot * (BUCKETS + 1u) + bucket], 1u);
    return 0u;
}

fn count_row(job: Job, member: Member, slot: u32, row: u32, column: u32, values: Quad) -> u32 {
    return count(job, member, slot, row, column, values.x)
        + count(job, member, slot, row, column + 1u, values.y)
        + count(job, member, slot, row, column + 2u, values.z)
        + count(job, member, slot, row, column + 3u, values.w);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let member = members[work.w];
    let row = work.y + 2u * (t / QUADS);
    if (t == 0u) {
        atomicStore(&larger, 0u);
    }
    workgroupBarrier();
    var own = 0u;
    for (var column = work.z; column < min(work.z + SPAN, job.input); column += COLUMNS) {
        let values = entries_of(job, member, work.y, column, t);
        let first = column + 4u * (t % QUADS);
        own += count_row(job, member, work.w, row, first, values.first);
        own += count_row(job, member, work.w, row + 1u, first, values.second);
    }
    if (own > 0u) {
        atomicAdd(&larger, own);
    }
    workgroupBarrier();
    if (t == 0u) {
        let all = atomicLoad(&larger);
        if (all > 0u) {
            atomicAdd(&counts[work.w * (BUCKETS + 1u) + BUCKETS], all);
        }
    }
}
