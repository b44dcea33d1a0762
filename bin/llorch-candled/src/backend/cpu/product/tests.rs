use super::*;
use crate::backend::cpu::format::{Block, dequantize};
use crate::backend::cpu::quantize::Grouping;
use crate::backend::cpu::testing::{Random, fill_extreme, fill_moderate};

/// Owned activations of the kind a format takes, quantised on the portable tier.
enum Owned {
    Floats(Vec<f32>),
    By32(Rows<Block32>),
    By256(Rows<Block256>),
}

impl Owned {
    fn new(format: Format, values: &[f32], columns: usize) -> Self {
        match Grouping::of(format) {
            Grouping::Floats => Self::Floats(values.to_vec()),
            Grouping::By32 => {
                let mut rows = Rows::new();
                rows.quantize(Tier::Portable, values, columns);
                Self::By32(rows)
            }
            Grouping::By256 => {
                let mut rows = Rows::new();
                rows.quantize(Tier::Portable, values, columns);
                Self::By256(rows)
            }
        }
    }

    fn view(&self) -> Activations<'_> {
        match self {
            Self::Floats(values) => Activations::Floats(values),
            Self::By32(rows) => Activations::By32(rows),
            Self::By256(rows) => Activations::By256(rows),
        }
    }

    /// Returns the numbers that a row represents.
    fn row(&self, row: usize, columns: usize) -> Vec<f64> {
        let values = |quads: &[i32], scale: f32| -> Vec<f64> {
            let bytes = quads.iter().flat_map(|quad| quad.to_le_bytes());
            bytes
                .map(|byte| f64::from(byte.cast_signed()) * f64::from(scale))
                .collect()
        };
        match self {
            Self::Floats(all) => all[row * columns..][..columns]
                .iter()
                .copied()
                .map(f64::from)
                .collect(),
            Self::By32(rows) => rows
                .row(row)
                .iter()
                .flat_map(|b| values(&b.quads, b.scale))
                .collect(),
            Self::By256(rows) => {
                let block = |b: &Block256| values(b.quads.as_flattened(), b.scale);
                rows.row(row).iter().flat_map(block).collect()
            }
        }
    }
}

fn product(tier: Tier, weights: &PackedMatrix, activations: &Owned, rows: usize) -> Vec<f32> {
    let columns = weights.rows();
    let mut values = vec![0.0; rows * columns];
    let mut out = Output::new(&mut values, rows, columns, columns);
    multiply(tier, weights, activations.view(), &mut out.whole());
    values
}

/// Returns the magnitudes of the terms that a product adds up for a row of weights, scale and minimum separately.
fn magnitudes(format: Format, bytes: &[u8]) -> Vec<f64> {
    let half = |bits| f64::from(half::f16::from_bits(bits).to_f32()).abs();
    let mut all = Vec::new();
    let mut block = Block::ZERO;
    for bytes in bytes.chunks_exact(format.block_bytes()) {
        block.read(format, bytes);
        for column in 0..format.block_len() {
            let quant = match format {
                Format::Q8_0 => i32::from(block.quants[column].cast_signed()),
                _ => i32::from(block.quants[column]) - format.offset(),
            };
            let scaled = half(block.scale) * f64::from(block.scales[column / 16]);
            let minimum = half(block.minimum) * f64::from(block.minima[column / 16]);
            all.push((scaled * f64::from(quant)).abs() + minimum);
        }
    }
    all
}

/// Checks that every sum of n terms, added one by one, is within n half-units in the last place of the sum of magnitudes.
#[test]
fn products_agree_with_exact_ones() {
    let mut random = Random::new(1);
    for format in Format::ALL {
        let unit = if format.block_len() == 1 {
            36
        } else {
            format.block_len()
        };
        for (rows, n, blocks) in [(1, 1, 1), (3, 15, 2), (2, 16, 3), (13, 33, 5), (5, 65, 9)] {
            let columns = blocks * unit;
            let mut source = vec![0; n * format.row_bytes(columns)];
            fill_moderate(format, &mut source, &mut random);
            let values: Vec<f32> = (0..rows * columns).map(|_| random.float()).collect();
            let activations = Owned::new(format, &values, columns);
            let weights = PackedMatrix::pack(format, n, columns, &source);
            let out = product(Tier::best(), &weights, &activations, rows);
            for row in 0..rows {
                let activations = activations.row(row, columns);
                for column in 0..n {
                    let bytes =
                        &source[column * format.row_bytes(columns)..][..format.row_bytes(columns)];
                    let mut weights = vec![0.0; columns];
                    dequantize(format, bytes, &mut weights);
                    let magnitudes = match Grouping::of(format) {
                        Grouping::Floats => weights.iter().map(|&w| f64::from(w).abs()).collect(),
                        _ => magnitudes(format, bytes),
                    };
                    let terms = || activations.iter().zip(&weights);
                    let exact: f64 = terms().map(|(a, &w)| a * f64::from(w)).sum();
                    let sum: f64 = activations
                        .iter()
                        .zip(magnitudes)
                        .map(|(a, m)| a.abs() * m)
                        .sum();
                    // Up to two additions for a block (or one for every fourth column, and two more), and in each term
                    // the rounding of both scales' product, the integer sum, the sum of activations and the weight.
                    let roundings = if unit == 36 {
                        columns / 4 + 2
                    } else {
                        2 * blocks + 4
                    };
                    let tolerance = sum * roundings as f64 * f64::from(f32::EPSILON) / 2.0;
                    let result = f64::from(out[row * n + column]);
                    assert!(
                        (result - exact).abs() <= tolerance,
                        "{format:?} {rows}×{n}×{columns}: {result} instead of {exact} ± {tolerance}"
                    );
                }
            }
        }
    }
}

fn assert_same(a: &[f32], b: &[f32], what: impl std::fmt::Debug) {
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(same, "{what:?}: element {i} is {a} and {b}");
    }
}

/// Compares all tiers and numbers of rows with rows computed one by one on the portable tier.
fn assert_tiers_agree(format: Format, fill: fn(Format, &mut [u8], &mut Random), most: usize) {
    let mut random = Random::new(2);
    let (n, columns) = (50, format.block_len().max(18) * 2);
    let mut source = vec![0; n * format.row_bytes(columns)];
    fill(format, &mut source, &mut random);
    let weights = PackedMatrix::pack(format, n, columns, &source);
    let values: Vec<f32> = (0..most * columns).map(|_| random.float()).collect();
    let mut expected = Vec::new();
    for row in values.chunks_exact(columns) {
        expected.extend(product(
            Tier::Portable,
            &weights,
            &Owned::new(format, row, columns),
            1,
        ));
    }
    for tier in Tier::available() {
        for rows in 1..=most {
            let activations = Owned::new(format, &values[..rows * columns], columns);
            let out = product(tier, &weights, &activations, rows);
            assert_same(&out, &expected, (format, tier, rows));
        }
    }
}

#[test]
fn tiers_and_row_counts_agree() {
    for format in Format::ALL {
        assert_tiers_agree(format, fill_moderate, if cfg!(miri) { 2 } else { 30 });
    }
}

#[test]
fn tiers_agree_on_arbitrary_bytes() {
    for format in Format::ALL {
        assert_tiers_agree(format, fill_extreme, if cfg!(miri) { 2 } else { 8 });
    }
}

/// Checks weights and activations whose integer sums are the largest.
#[test]
fn integers_do_not_overflow() {
    for format in Format::ALL
        .into_iter()
        .filter(|format| format.block_len() > 1)
    {
        // 0xFF: the largest unsigned values, scales of −1 or 63; 0x7F, 0x80: the largest 8-bit values and scales.
        for byte in [0xFF, 0x7F, 0x80, 0x00] {
            let mut source = vec![byte; 16 * format.block_bytes()];
            let mut random = Random::new(3);
            if format == Format::Q6_K && byte != 0xFF {
                // Values of 63 or 0 with scales of 127 or −128.
                let quants = if byte == 0x7F { 0xFF } else { 0 };
                for block in source.chunks_exact_mut(210) {
                    block[..192].fill(quants);
                }
            }
            crate::backend::cpu::testing::fill_scales(format, &mut source, &mut random);
            let columns = format.block_len();
            let weights = PackedMatrix::pack(format, 16, columns, &source);
            for value in [1.0, -1.0] {
                let activations = Owned::new(format, &vec![value; 2 * columns], columns);
                let numbers = activations.row(0, columns);
                let expected: Vec<f64> = (0..16)
                    .map(|row| {
                        let bytes = &source[row * format.block_bytes()..];
                        let mut weights = vec![0.0; columns];
                        dequantize(format, &bytes[..format.block_bytes()], &mut weights);
                        weights
                            .iter()
                            .zip(&numbers)
                            .map(|(&w, a)| f64::from(w) * a)
                            .sum()
                    })
                    .collect();
                for tier in Tier::available() {
                    for (i, &x) in product(tier, &weights, &activations, 2).iter().enumerate() {
                        let expected = expected[i % 16];
                        let error = (f64::from(x) - expected).abs();
                        let bound = 1e-6
                            * magnitudes(
                                format,
                                &source[i % 16 * format.block_bytes()..][..format.block_bytes()],
                            )
                            .iter()
                            .sum::<f64>();
                        assert!(
                            error <= bound,
                            "{format:?} {tier:?} {byte:x}: {x}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn nan_and_infinity_spread_to_every_result_of_their_row() {
    let mut random = Random::new(4);
    for format in Format::ALL {
        let columns = format.block_len().max(16) * 2;
        let mut source = vec![0; 20 * format.row_bytes(columns)];
        fill_moderate(format, &mut source, &mut random);
        let weights = PackedMatrix::pack(format, 20, columns, &source);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values: Vec<f32> = (0..3 * columns).map(|_| random.float()).collect();
            values[columns + 5] = bad;
            let activations = Owned::new(format, &values, columns);
            for tier in Tier::available() {
                let out = product(tier, &weights, &activations, 3);
                let finite = |row: usize| out[20 * row..][..20].iter().all(|x| x.is_finite());
                assert!(finite(0) && finite(2), "{format:?} {tier:?}");
                assert!(
                    !out[20..40].iter().any(|x| x.is_finite()),
                    "{format:?} {tier:?}"
                );
                if format.block_len() > 1 {
                    assert!(
                        out[20..40].iter().all(|x| x.is_nan()),
                        "{format:?} {tier:?}"
                    );
                }
            }
        }
    }
}

/// Checks that several threads that pack and multiply parts and tiles get the result of one thread, also if rows are apart.
#[test]
fn threads_share_tiles() {
    let mut random = Random::new(5);
    let (format, n, columns, rows, stride) = (Format::Q5_0, 16 * 7 + 3, 96, 7, 128);
    let mut source = vec![0; n * format.row_bytes(columns)];
    fill_moderate(format, &mut source, &mut random);
    let values: Vec<f32> = (0..rows * columns).map(|_| random.float()).collect();
    let activations = Owned::new(format, &values, columns);
    let mut weights = PackedMatrix::new(format, n, columns);
    std::thread::scope(|scope| {
        for part in weights.parts_mut(3) {
            let source = &source;
            scope.spawn(move || part.pack(source));
        }
    });
    let expected = product(
        Tier::best(),
        &PackedMatrix::pack(format, n, columns, &source),
        &activations,
        rows,
    );
    let mut results = vec![7.0; (rows - 1) * stride + n];
    let out = Output::new(&mut results, rows, n, stride);
    std::thread::scope(|scope| {
        for tiles in [0..3, 3..4, 4..4, 4..8] {
            let (weights, out, activations) = (&weights, &out, activations.view());
            scope.spawn(move || {
                // SAFETY: each thread has its own tiles.
                let mut part = unsafe { out.part(tiles) };
                multiply(Tier::best(), weights, activations, &mut part);
            });
        }
    });
    for (row, expected) in results.chunks(stride).zip(expected.chunks_exact(n)) {
        assert_same(&row[..n], expected, "threads");
        assert!(row[n..].iter().all(|&x| x == 7.0), "written between rows");
    }
}
