//! Entries of updates, tile by tile, against plain f64, on the CPU and in every tier of the GPU.

use crate::common::{Random, devices, product};
use loraweld::compute::Batch;
use loraweld::compute::ops::{BUCKETS, EntryMember, EntryRule, entries, magnitudes};
use loraweld::{Device, Matrix};

/// Factors whose products every arithmetic holds exactly, so that results must be equal.
fn exact(random: &mut Random, rows: usize, cols: usize) -> Matrix {
    Matrix::from_fn(rows, cols, |_, _| ((random.bits() % 17) as f64 - 8.0) / 8.0)
}

fn members(ranks: &[usize], threshold: f32) -> Vec<EntryMember> {
    let mut end = 0;
    let scales = [1.0, -0.5, 2.0, 0.25];
    let of = |(k, &rank): (usize, &usize)| {
        end += rank;
        EntryMember { ranks: end - rank..end, scale: scales[k], threshold, key: [k as u32, 7], weight: 1.0 }
    };
    ranks.iter().enumerate().map(of).collect()
}

fn factors(
    device: &Device,
    random: &mut Random,
    ranks: &[usize],
    rows: usize,
    cols: usize,
) -> (Matrix, Matrix, [Batch; 2]) {
    let rank = ranks.iter().sum();
    let (a, b) = (exact(random, rank, cols), exact(random, rows, rank));
    let upload = |m: &Matrix| Batch::upload(device, device.factor(), std::slice::from_ref(m)).unwrap();
    let batches = [upload(&a), upload(&b)];
    (a, b, batches)
}

fn updates(a: &Matrix, b: &Matrix, members: &[EntryMember]) -> Vec<Matrix> {
    let of = |m: &EntryMember| {
        let a = Matrix::from_fn(m.ranks.len(), a.cols(), |k, j| a[(m.ranks.start + k, j)]);
        let b = Matrix::from_fn(b.rows(), m.ranks.len(), |i, k| m.scale * b[(i, m.ranks.start + k)]);
        product(&b, &a)
    };
    members.iter().map(of).collect()
}

const SHAPES: [(&[usize], usize, usize); 6] = [
    (&[1], 1, 1),
    (&[1, 3], 7, 5),
    (&[4, 2, 9], 33, 16),
    (&[17, 40], 50, 3),
    (&[2, 2, 2, 2], 1, 70),
    (&[33], 65, 47),
];

#[test]
fn entries_are_merged_by_the_rule() {
    for case in devices() {
        let mut random = Random(31);
        for (ranks, rows, cols) in SHAPES {
            let (a, b, [a_batch, b_batch]) = factors(&case.device, &mut random, ranks, rows, cols);
            for (elect, zero_is_minus, chance, threshold, weighted) in [
                (false, false, u32::MAX, 0.0, false),
                (true, false, u32::MAX, 0.75, false),
                (true, true, u32::MAX, 0.0, false),
                (true, false, u32::MAX, 0.25, true),
                (false, false, 1 << 31, 0.0, true),
                (true, true, 1 << 30, 0.25, true),
            ] {
                let mut members = members(ranks, threshold);
                for (member, weight) in members.iter_mut().zip([2.0, -1.0, 0.5, 0.0]) {
                    member.weight = if weighted { weight } else { 1.0 };
                }
                let rule = EntryRule { members, chance, elect, zero_is_minus, scale: 0.5 };
                let dense = updates(&a, &b, &rule.members);
                for range in [0..rows, rows / 2..rows, rows / 3..rows / 2] {
                    let got = entries(&case.device, &a_batch, &b_batch, &rule, range.clone()).unwrap();
                    let values = got.values.download(&case.device).unwrap().remove(0);
                    assert_eq!((values.rows(), values.cols()), (range.len(), cols));
                    let (mut square, mut signs) = (0.0, 0);
                    for (i, row) in range.clone().enumerate() {
                        for j in 0..cols {
                            let (want, sign) = rule.decided(row, j, dense.iter().map(|m| m[(row, j)]));
                            let what = format!("{}: {ranks:?}, row {row}, column {j}", case.name);
                            // Only the division by a count of three rounds.
                            assert!(
                                (values[(i, j)] - want).abs() <= 1e-6 * want.abs(),
                                "{what}: {} {want}",
                                values[(i, j)]
                            );
                            square += want * want;
                            signs += sign;
                        }
                    }
                    assert_eq!(got.signs, signs, "{}: {ranks:?}", case.name);
                    assert!(
                        (got.square - square).abs() <= 1e-5 * square,
                        "{}: {} {square}",
                        case.name,
                        got.square
                    );
                }
            }
        }
    }
}

#[test]
fn magnitudes_are_counted_exactly() {
    for case in devices() {
        let mut random = Random(32);
        for (ranks, rows, cols) in SHAPES {
            let (a, b, [a_batch, b_batch]) = factors(&case.device, &mut random, ranks, rows, cols);
            let members = members(ranks, 0.0);
            let dense = updates(&a, &b, &members);
            let bits = |m: &Matrix| m.data().iter().map(|v| (v.abs() as f32).to_bits()).collect::<Vec<_>>();
            let prefixes: Vec<u32> = dense.iter().map(|m| bits(m)[0] >> 15).collect();
            for prefixes in [None, Some(&prefixes[..])] {
                let mut counts = vec![vec![0; BUCKETS]; ranks.len()];
                for range in [0..rows / 2, rows / 2..rows] {
                    magnitudes(&case.device, &a_batch, &b_batch, &members, prefixes, range, &mut counts)
                        .unwrap();
                }
                for (k, counts) in counts.iter().enumerate() {
                    let mut want = vec![0u64; BUCKETS];
                    for bits in bits(&dense[k]) {
                        match prefixes {
                            None => want[(bits >> 15) as usize] += 1,
                            Some(prefixes) if bits >> 15 == prefixes[k] => {
                                want[(bits & 0x7fff) as usize] += 1
                            }
                            Some(_) => {}
                        }
                    }
                    assert!(*counts == want, "{}: {ranks:?}, member {k}", case.name);
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_where_it_is() {
    for case in devices() {
        let device = &case.device;
        let upload = |rows, cols, data: &[f64]| {
            Batch::upload(device, device.factor(), &[Matrix::new(rows, cols, data.to_vec()).unwrap()])
                .unwrap()
        };
        let (a, b) = (upload(1, 3, &[1.0, f64::NAN, f64::INFINITY]), upload(1, 1, &[2.0]));
        let rule = EntryRule {
            members: members(&[1], 0.0),
            chance: u32::MAX,
            elect: false,
            zero_is_minus: false,
            scale: 1.0,
        };
        let got = entries(device, &a, &b, &rule, 0..1).unwrap().values.download(device).unwrap().remove(0);
        assert_eq!(got.data()[0], 2.0, "{}", case.name);
    }
}
