// Which thread of a workgroup this is, and where in its subgroup of 32.

var<private> t: u32;
var<private> subgroup: u32;
var<private> lane: u32;

fn locate(thread: u32, subgroup_id: u32, subgroup_lane: u32) {
    t = thread;
    subgroup = subgroup_id;
    lane = subgroup_lane;
}
