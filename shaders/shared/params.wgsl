// Bindings 0 to 2 of every kernel, and the index of the workgroup in the work table.
// The kernel declares `struct Job`.

struct Params {
    // Zero, though no compiler can know it: see real_double_single.wgsl.
    zero: u32,
    // Workgroups in one row of the dispatch grid.
    grid_width: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(2) var<storage, read> work_table: array<vec4<u32>>;

fn work_index(workgroup: vec3<u32>) -> u32 {
    return workgroup.y * params.grid_width + workgroup.x;
}

// The last row of the grid may be longer than the table.
fn has_work(workgroup: vec3<u32>) -> bool {
    return work_index(workgroup) < arrayLength(&work_table);
}
