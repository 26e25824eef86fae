// Z as halves for matrix units; see branch_split.wgsl.
//
//   Z: tokens × rank, f32      halves: z_rows × columns, f16
//   scales: what undoes the powers of two, Z's and B_cat's: branches × z_rows, or z_rows
//
// STEP_Z: each branch's part of a row of Z brought into f16's range.
// STEP_WEIGHTED: the whole row, each branch times its factor and its weight on the token; where the weight is zero
// it becomes zero, also where the branch overflowed.
// Grid: (8 tokens, branch) or (8 tokens, 1).
// Bindings: 3 Z, 4 halves, 5 scales, weighted 6 weights, 7 controls. The permutation sets STEP.

#import branch
#import exponents

@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> halves: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;
@group(0) @binding(6) var<storage, read> weights: array<f32>;
@group(0) @binding(7) var<storage, read> controls: Controls;

#import branch_split

const STEP_Z: u32 = 0u;
const STEP_WEIGHTED: u32 = 1u;

var<workgroup> most: array<u32, 256>;

// The most of 32 threads.
fn row_most(values: vec4<u32>, row: u32, lane: u32) -> u32 {
    most[row * 32u + lane] = max(max(values.x, values.y), max(values.z, values.w));
    workgroupBarrier();
    var all = 0u;
    for (var i = 0u; i < 32u; i++) {
        all = max(all, most[row * 32u + i]);
    }
    return all;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let row = t / 32u;
    let lane = t % 32u;
    let token = work.x * 8u + row;
    // A quad of columns each, of which there are 32 at most.
    let weighted = STEP == STEP_WEIGHTED;
    var column = lane * 4u;
    var end = job.columns;
    if (!weighted) {
        column += jobs[0].column_starts[work.y];
        end = jobs[0].column_starts[work.y + 1u];
    }
    let inside = column < end;
    var value = vec4<f32>(0.0);
    if (inside && token < job.tokens) {
        let branch = branch_of(column);
        let rank = jobs[0].starts[branch + 1u] - jobs[0].starts[branch];
        value = quad(token * job.rank + jobs[0].starts[branch], 1u, column - jobs[0].column_starts[branch], rank);
        if (weighted) {
            let weight = weights[token * job.branches + branch];
            let factor = jobs[0].factors[branch] * controls.strengths[jobs[0].adapters[branch]];
            value = select(value * (weight * factor), vec4<f32>(0.0), weight == 0.0);
        }
    }
    let scale = scale_of(row_most(exponents(bitcast<vec4<u32>>(value)), row, lane));
    if (lane == 0u) {
        // 1 / s of a power of two, exactly.
        let inverse = bitcast<f32>((254u << 23u) - bitcast<u32>(scale));
        scales[select(work.y, 0u, weighted) * job.z_rows + token] = inverse / B_SCALE;
    }
    if (inside) {
        let place = (token * job.columns + column) / 4u;
        let scaled = value * scale;
        let high = high_part(scaled);
        halves[place] = vec4<f16>(high);
        halves[job.z_rows * job.columns / 4u + place] = vec4<f16>(scaled - high);
    }
}
