//! Speed of products on one thread: bytes per second of one or a few rows with weights that are in no cache, and multiply-adds
//! per second of many rows.
//!
//! ```text
//! cargo bench -p llorch-candled --bench kernels -- [few|rows|all] [tier] [format]
//! cargo bench -p llorch-candled --bench kernels -- machine THREADS MB
//! ```
//!
//! `machine` measures the limits of products: bytes that the threads read per second if they share this number of megabytes and
//! read them again and again, and byte products in registers. Every figure is the median of some repetitions, with the minimum
//! and the maximum.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use llorch_candled::backend::cpu::format::Format;
use llorch_candled::backend::cpu::lanes::{Kernel, Lanes, Tier};
use llorch_candled::backend::cpu::pack::PackedMatrix;
use llorch_candled::backend::cpu::product::{Activations, Output, multiply};
use llorch_candled::backend::cpu::quantize::{Block32, Block256, Grouping, Rows};

/// Format, rows (n) and columns (k).
const SHAPES: [(Format, usize, usize); 14] = [
    (Format::Q4_1, 1536, 576),
    (Format::Q8_0, 49152, 576),
    (Format::Q5_0, 2048, 640),
    (Format::Q8_0, 2048, 640),
    (Format::Q4_K, 4096, 1024),
    (Format::Q6_K, 4096, 1024),
    (Format::Q4_K, 5632, 2048),
    (Format::Q6_K, 5632, 2048),
    (Format::Q4_0, 5632, 2048),
    (Format::Q5_K, 5632, 2048),
    (Format::Q2_K, 5632, 2048),
    (Format::Q3_K, 5632, 2048),
    (Format::F16, 5632, 2048),
    (Format::F32, 1536, 576),
];

/// Bytes of distinct matrices for a few rows: more than any cache holds.
fn cold_bytes() -> usize {
    let mib = std::env::var("COLD_MIB")
        .ok()
        .and_then(|mib| mib.parse().ok());
    mib.unwrap_or(600) << 20
}

/// Kernel that sums memory, to measure how fast it is read.
struct ReadAll<'a>(&'a [u8]);

impl Kernel for ReadAll<'_> {
    type Output = i32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> i32 {
        let mut sums = [lanes.splat_byte(0); 4];
        for four in self.0.as_chunks::<64>().0.as_chunks::<4>().0 {
            for (sum, from) in sums.iter_mut().zip(four) {
                *sum = lanes.or_bytes(*sum, lanes.load_bytes(from));
            }
        }
        let ored = lanes.or_bytes(
            lanes.or_bytes(sums[0], sums[1]),
            lanes.or_bytes(sums[2], sums[3]),
        );
        lanes.sum_int(lanes.to_bits(lanes.bytes_as_floats(ored)))
    }
}

/// Number of places that [`ReadAhead`] reads concurrently, and distance in bytes at which it prefetches. Larger values read no
/// faster.
const PLACES: usize = 4;
const AHEAD: usize = 4096;

/// Kernel that sums memory as fast as a loop can.
struct ReadAhead<'a>(&'a [u8]);

impl Kernel for ReadAhead<'_> {
    type Output = i32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> i32 {
        let lines = self.0.as_chunks::<64>().0;
        let part = lines.len() / PLACES;
        let mut sums = [lanes.splat_byte(0); PLACES];
        for index in 0..part {
            for (place, sum) in sums.iter_mut().enumerate() {
                let line = &lines[place * part + index];
                lanes.prefetch(&line[0], AHEAD);
                *sum = lanes.or_bytes(*sum, lanes.load_bytes(line));
            }
        }
        let sum = sums.into_iter().reduce(|a, b| lanes.or_bytes(a, b));
        let sum = sum.unwrap_or_else(|| lanes.splat_byte(0));
        lanes.sum_int(lanes.to_bits(lanes.bytes_as_floats(sum)))
    }
}

/// Kernel of dot products in registers: the most multiply-adds that the processor can do.
struct Peak(usize);

impl Kernel for Peak {
    type Output = i32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> i32 {
        let weights = lanes.splat_byte(black_box(1));
        let mut sums = [lanes.splat_int(0); 12];
        for i in 0..self.0 {
            for sum in &mut sums {
                *sum = lanes.dot_u7(*sum, weights, i as i32);
            }
        }
        sums.into_iter()
            .map(|sum| lanes.sum_int(sum))
            .fold(0, i32::wrapping_add)
    }
}

/// Returns median, minimum and maximum of `work` / seconds, in units of 10⁹.
fn rates(work: f64, repetitions: usize, mut run: impl FnMut()) -> [f64; 3] {
    run();
    let mut rates: Vec<f64> = (0..repetitions)
        .map(|_| {
            let start = Instant::now();
            run();
            work / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    [rates[repetitions / 2], rates[0], rates[repetitions - 1]]
}

/// Returns pseudo-random bytes. An exponent bit of every pair is cleared so that scales are finite. Floats have typical values.
fn noise(format: Format, bytes: usize) -> Vec<u8> {
    if format == Format::F32 {
        return (0..bytes / 4)
            .flat_map(|i| (i as f32).sin().to_le_bytes())
            .collect();
    }
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8 & 0xBF
    };
    (0..bytes).map(|_| next()).collect()
}

struct Case {
    tier: Tier,
    rows: usize,
    columns: usize,
    floats: Vec<f32>,
    by32: Rows<Block32>,
    by256: Rows<Block256>,
}

impl Case {
    fn new(tier: Tier, format: Format, rows: usize, columns: usize) -> Self {
        let floats: Vec<f32> = (0..rows * columns)
            .map(|i| (i as f32 * 0.37).sin())
            .collect();
        let (mut by32, mut by256) = (Rows::new(), Rows::new());
        match Grouping::of(format) {
            Grouping::Floats => {}
            Grouping::By32 => by32.quantize(tier, &floats, columns),
            Grouping::By256 => by256.quantize(tier, &floats, columns),
        }
        Self {
            tier,
            rows,
            columns,
            floats,
            by32,
            by256,
        }
    }

    fn multiply(&self, weights: &PackedMatrix, results: &mut [f32]) {
        let activations = match Grouping::of(weights.format()) {
            Grouping::Floats => Activations::Floats(&self.floats),
            Grouping::By32 => Activations::By32(&self.by32),
            Grouping::By256 => Activations::By256(&self.by256),
        };
        assert_eq!(self.columns, weights.columns());
        let mut out = Output::new(results, self.rows, weights.rows(), weights.rows());
        multiply(self.tier, weights, activations, &mut out.whole());
    }
}

fn main() {
    let arguments = std::env::args().skip(1);
    let arguments: Vec<String> = arguments.filter(|a| !a.starts_with("--")).collect();
    let argument = |i: usize| arguments.get(i).map_or("all", String::as_str);
    if argument(0) == "machine" {
        let number = |i: usize| argument(i).parse::<usize>().expect("a number");
        return machine(number(1), number(2));
    }
    let tiers: Vec<Tier> = match argument(1) {
        "all" => vec![Tier::best()],
        name => Tier::ALL
            .into_iter()
            .filter(|tier| format!("{tier:?}") == name)
            .collect(),
    };
    for tier in tiers {
        for (format, n, k) in SHAPES {
            if !["all", &format!("{format:?}")].contains(&argument(2)) {
                continue;
            }
            let source = noise(format, n * format.row_bytes(k));
            let weights = PackedMatrix::pack(format, n, k, &source);
            if argument(0) != "few" {
                several_rows(tier, &weights);
            }
            if argument(0) != "rows" {
                few_rows(tier, weights, &source);
            }
        }
    }
}

/// Loops of [`Peak`] in a measurement.
const PEAK_LOOPS: usize = 4_000_000;
/// Products of bytes in a loop of [`Peak`].
const PEAK_PRODUCTS: usize = 12 * 64;

/// Prints the limits of the machine with this number of threads. A cache may hold a part of `megabytes`, as of a model.
fn machine(threads: usize, megabytes: usize) {
    let tier = Tier::best();
    let share = megabytes * 1_000_000 / threads;
    let memory: Vec<Vec<u8>> = (0..threads).map(|_| vec![1; share]).collect();
    // Both take so long that the start of the threads does not count.
    let times = 1_000_usize.div_ceil(megabytes);
    let read = rates((times * threads * share) as f64, 7, || {
        together(threads, |thread| {
            for _ in 0..times {
                black_box(tier.run(ReadAhead(black_box(&memory[thread]))));
            }
        });
    });
    let loops = 10 * PEAK_LOOPS;
    let work = (threads * loops * PEAK_PRODUCTS) as f64;
    let peak = rates(work, 7, || {
        together(threads, |_| {
            black_box(tier.run(Peak(black_box(loops))));
        });
    });
    let show = |what, [median, least, most]: [f64; 3], unit| {
        println!("{what} with {threads} threads: {median:.2} [{least:.2}..{most:.2}] {unit}");
    };
    show("read", read, "GB/s");
    show("products", peak, "GMAC/s");
}

/// Runs work on several threads concurrently.
fn together(threads: usize, work: impl Fn(usize) + Sync) {
    let (start, work) = (Barrier::new(threads), &work);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                work(thread);
            });
        }
    });
}

fn few_rows(tier: Tier, first: PackedMatrix, source: &[u8]) {
    let (format, n, k) = (first.format(), first.rows(), first.columns());
    let count = cold_bytes().div_ceil(first.bytes());
    let mut all = vec![first];
    all.extend((1..count).map(|_| PackedMatrix::pack(format, n, k, source)));
    let memory = vec![1; cold_bytes()];
    let bytes = (count * all[0].bytes()) as f64;
    for m in [1, 2, 4, 8] {
        let mut results = vec![0.0; m * n];
        let case = Case::new(tier, format, m, k);
        // Both are measured in turn, because the machine's memory bandwidth is shared.
        let mut ratios = Vec::new();
        let mut reads = Vec::new();
        let mut larges = Vec::new();
        let mut products = Vec::new();
        for _ in 0..7 {
            let [large, ..] = rates(memory.len() as f64, 1, || {
                black_box(Tier::best().run(ReadAll(&memory)));
            });
            larges.push(large);
            let [read, ..] = rates(bytes, 1, || {
                for weights in &all {
                    black_box(Tier::best().run(ReadAll(weights.as_bytes())));
                }
            });
            let [product, ..] = rates(bytes, 1, || {
                for weights in &all {
                    case.multiply(weights, &mut results);
                }
            });
            ratios.push(product / read);
            reads.push(read);
            products.push(product);
        }
        let sorted = |mut x: Vec<f64>| {
            x.sort_by(f64::total_cmp);
            x
        };
        let (ratios, reads, products, larges) = (
            sorted(ratios),
            sorted(reads),
            sorted(products),
            sorted(larges),
        );
        println!(
            "{tier:?} {format:?} {n}×{k} m={m}: {:.1} [{:.1}..{:.1}] GB/s, read {:.1} [{:.1}..{:.1}], ratio {:.2} [{:.2}..{:.2}]; read of one allocation {:.1} [{:.1}..{:.1}]",
            products[3],
            products[0],
            products[6],
            reads[3],
            reads[0],
            reads[6],
            ratios[3],
            ratios[0],
            ratios[6],
            larges[3],
            larges[0],
            larges[6]
        );
    }
}

fn several_rows(tier: Tier, weights: &PackedMatrix) {
    let (format, n, k) = (weights.format(), weights.rows(), weights.columns());
    let [peak, ..] = rates((PEAK_LOOPS * PEAK_PRODUCTS) as f64, 3, || {
        black_box(tier.run(Peak(black_box(PEAK_LOOPS))));
    });
    print!("{tier:?} {format:?} {n}×{k}, peak {peak:.0} GMAC/s:");
    for rows in [512, 64, 8] {
        let case = Case::new(tier, format, rows, k);
        let mut results = vec![0.0; rows * n];
        let work = (rows * n * k) as f64;
        let calls = (4e8 / work).ceil();
        let [rate, least, most] = rates(work * calls, 5, || {
            for _ in 0..calls as usize {
                case.multiply(weights, &mut results);
            }
        });
        print!(
            " m={rows}: {rate:.0} [{least:.0}..{most:.0}] {:.2};",
            rate / peak
        );
    }
    println!();
}
