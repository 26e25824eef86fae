// Factors as rows: copies A, or B transposed, widened to f32, each row scaled by its own power of two.
//
//   A: rows × cols to rows × width      B: rows × cols to cols × width, transposed
//
// A job is one factor: row-major, of f32, f16 or bf16, that goes to some rows of a matrix. Work: (job, first row, first
// column of the source). Each workgroup copies 4 tiles of 32 × 32, which follow each other along the rows of the target.
// Bindings: 3 sources as raw words, 4 scales, 5 target.

#import shared/params
#import shared/words

struct Job {
    source: u32,        // first word
    dtype: u32,
    rows: u32,
    cols: u32,
    transposed: u32,
    destination: u32,   // first element
    scales: u32,        // first scale, one for each row of the target
}

@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read> scales: array<f32>;
@group(0) @binding(5) var<storage, read_write> target_rows: array<f32>;

const TILE: u32 = 32u;
const TILES: u32 = 4u;
// One more than the tile, so that columns lie in different banks.
const STRIDE: u32 = 33u;

var<workgroup> tile: array<f32, TILE * STRIDE>;

fn value(job: Job, e: u32) -> f32 {
    if (job.dtype == F32) {
        return bitcast<f32>(words[job.source + e]);
    }
    let pair = unpack_halves(words[job.source + e / 2u], job.dtype);
    return select(pair.x, pair.y, (e & 1u) == 1u);
}

fn copy_tile(job: Job, first: vec2<u32>, row_lane: u32, j: u32) {
    for (var i = row_lane; i < TILE; i += 8u) {
        let row = first.x + i;
        let column = first.y + j;
        if (row < job.rows && column < job.cols) {
            tile[i * STRIDE + j] = value(job, row * job.cols + column);
        }
    }
    workgroupBarrier();
    for (var i = row_lane; i < TILE; i += 8u) {
        if (job.transposed == 0u) {
            let row = first.x + i;
            let column = first.y + j;
            if (row < job.rows && column < job.cols) {
                target_rows[job.destination + row * job.cols + column] = tile[i * STRIDE + j] * scales[job.scales + row];
            }
        } else {
            let row = first.y + i;
            let column = first.x + j;
            if (row < job.cols && column < job.rows) {
                target_rows[job.destination + row * job.rows + column] = tile[j * STRIDE + i] * scales[job.scales + row];
            }
        }
    }
    // The tile is read by all before it is written again.
    workgroupBarrier();
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let step = select(vec2(0u, TILE), vec2(TILE, 0u), job.transposed != 0u);
    for (var i = 0u; i < TILES; i++) {
        copy_tile(job, work.yz + i * step, t / TILE, t % TILE);
    }
}
