// branch/apply.wgsl for features of 16 bits on matrix units, in one product of halves: F0 += Z·B_catᵀ, in place, rounded
// once to the type of F0; branch/choose.wgsl has weighed Z.
//
//   F0: tokens × width in f16 or bf16; width a multiple of 8
//
// Grid: (token tile, part of the channels). Bindings: 5 F0; see branch/shared/block.wgsl. The permutation sets DTYPE.

enable f16;

#import shared/words
#import shared/pack
#import shared/halves
#import shared/row_lanes
#import branch/shared/features_halves
#import branch/shared/job
#import branch/shared/split

@group(0) @binding(5) var<storage, read_write> f0: array<vec4<u32>>;

#import branch/shared/block
#import multiply

// Lanes that have a row of a block, 8 channels each; rows at once; and how often for all.
const LANES: u32 = CHANNELS / 8u;
const ROWS: u32 = 32u / LANES;
const TIMES: u32 = TOKENS / ROWS;

fn added(f: vec4<u32>, row: u32) -> vec4<u32> {
    let at = subgroup * OUT_LEN + row * OUT_STRIDE + lane % LANES * 2u;
    let inverse = inverses[row];
    let left = narrowed(widened(f.xy) + sums[at] * inverse);
    let right = narrowed(widened(f.zw) + sums[at + 1u] * inverse);
    return vec4<u32>(left, right);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) work: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    locate(thread, subgroup_id, subgroup_lane);
    let job = jobs[0];
    let first_token = job.first + work.x * TOKENS;
    stage_z(job, 0u, job.columns, first_token, 0u, select(job.columns, DEPTH, HELD), 0u);
    let row = lane / LANES;
    // Rows that are not there are read as the last.
    let rows = job.first + job.count - first_token;
    let start = work.y * job.part_width;
    let stop = min(start + job.part_width, job.width);
    var places: array<u32, TIMES>;
    var next: array<vec4<u32>, TIMES>;
    let first_vector = min(start + subgroup * CHANNELS + lane % LANES * 8u, job.width - 8u) / 8u;
    for (var i = 0u; i < TIMES; i++) {
        let token = first_token - job.first + min(row + i * ROWS, rows - 1u);
        places[i] = job.f0 / 4u + token * (job.width / 8u);
        next[i] = f0[places[i] + first_vector];
    }
    workgroupBarrier();
    hold();
    for (var base = start; base < stop; base += SUBGROUPS * CHANNELS) {
        let block = base + subgroup * CHANNELS;
        let channel = block + lane % LANES * 8u;
        let vector = channel / 8u;
        // The next block is on its way while this one is at work.
        let ahead = min(channel + SUBGROUPS * CHANNELS, job.width - 8u) / 8u;
        var f = next;
        for (var i = 0u; i < TIMES; i++) {
            next[i] = f0[places[i] + ahead];
        }
        multiply_all(job, min(block, (job.width - 1u) / CHANNELS * CHANNELS));
        meet();
        for (var i = 0u; i < TIMES; i++) {
            if (channel < stop && row + i * ROWS < rows) {
                f0[places[i] + vector] = added(f[i], row + i * ROWS);
            }
        }
        meet();
    }
}
