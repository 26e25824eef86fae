// Workgroups that are numbered through, in as many rows of a grid as they take.

// The number of a workgroup. Workgroups past the last have to find that there is nothing to do.
fn workgroup_number(workgroup: vec3<u32>, workgroups: vec3<u32>) -> u32 {
    return workgroup.y * workgroups.x + workgroup.x;
}
