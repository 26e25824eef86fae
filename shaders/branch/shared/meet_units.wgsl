// Between what lanes of a subgroup write and what others of it read.

#import branch/shared/place_units

fn meet() {
    subgroupBarrier();
}
