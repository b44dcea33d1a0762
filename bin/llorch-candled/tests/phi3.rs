//! Phi-3's features, each against a plain forward pass in double precision, which follows the model's description in
//! transformers (`modeling_phi3`) and shares no code with the worker.

mod support;

use std::collections::HashMap;

use llorch_candled::backend::Device;
use llorch_candled::backend::cpu::lanes::Tier;
use llorch_candled::engine::{Engine, Sizes};
use support::tiny_model::{HEAD_DIM, HEADS, PHI3_ROPE_DIM, Phi3, TinyModel, WIDTH};

/// A matrix as a vector of rows.
type Matrix = Vec<Vec<f64>>;

/// A model and the context that it serves.
#[derive(Debug, Clone)]
struct Case {
    model: TinyModel,
    context: usize,
}

impl Case {
    fn new(phi3: Phi3, context: usize) -> Self {
        let model = TinyModel {
            architecture: "phi3",
            blocks: 3,
            context: 1024,
            phi3,
            ..TinyModel::default()
        };
        Self { model, context }
    }

    fn engine(&self, device: Device) -> Engine {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("tiny.gguf");
        self.model.write(&path).expect("the model is written");
        let sizes = Sizes {
            context_length: Some(self.context),
            ..Sizes::default()
        };
        Engine::load(&path, device, sizes, &mut |_, _| ()).expect("the model loads")
    }
}

/// Returns a model for each feature of a file.
fn cases() -> Vec<Case> {
    let plain = Phi3 {
        window: Some(0),
        ..Phi3::default()
    };
    let long = Phi3 {
        original_context: Some(256),
        ..plain
    };
    let stated = Phi3 {
        attn_factor: Some(1.25),
        ..long
    };
    vec![
        Case::new(plain, 1024),
        Case::new(Phi3::default(), 1024),
        Case::new(
            Phi3 {
                split: true,
                ..plain
            },
            1024,
        ),
        Case::new(
            Phi3 {
                tied: true,
                ..plain
            },
            1024,
        ),
        Case::new(long, 256),
        Case::new(long, 257),
        Case::new(stated, 256),
        Case::new(stated, 257),
        Case::new(
            Phi3 {
                tied: true,
                window: Some(33),
                ..stated
            },
            1024,
        ),
    ]
}

fn tokens(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 11 + 3) % 230).collect()
}

/// Returns the logits after every token, computed one by one.
fn logits(engine: &Engine, tokens: &[u32]) -> Matrix {
    let mut sequence = engine.sequence(tokens.len()).expect("room");
    let mut after = |token: &u32| {
        let logits = sequence.logits(&[*token]).expect("the model computes");
        logits.into_iter().map(f64::from).collect()
    };
    tokens.iter().map(&mut after).collect()
}

/// A model's tensors, with the parameters of its rotation.
struct Reference {
    tensors: HashMap<String, (usize, Vec<f32>)>,
    kv_heads: usize,
    inner: usize,
    blocks: usize,
    window: usize,
    divisors: Vec<f64>,
    magnitude: f64,
}

impl Reference {
    fn of(case: &Case) -> Self {
        let Case { model, context } = case;
        let tensors = model.tensors().into_iter();
        let tensors: HashMap<_, _> = tensors
            .map(|(name, dims, values)| (name, (dims[0], values)))
            .collect();
        let (mut factors, mut magnitude) = (vec![1.0; PHI3_ROPE_DIM / 2], 1.0);
        if let Some(original) = model.phi3.original_context {
            let which = if *context > original as usize {
                "long"
            } else {
                "short"
            };
            let (_, values) = &tensors[&format!("rope_factors_{which}.weight")];
            factors = values.iter().copied().map(f64::from).collect();
            let scale = f64::from(model.context) / f64::from(original);
            let computed = (1.0 + scale.ln() / f64::from(original).ln()).sqrt();
            magnitude = model.phi3.attn_factor.map_or(computed, f64::from);
        }
        let frequency = |(pair, factor): (usize, &f64)| {
            factor * 10_000f64.powf((2 * pair) as f64 / PHI3_ROPE_DIM as f64)
        };
        Self {
            kv_heads: model.kv_heads(),
            inner: model.inner(),
            blocks: model.blocks,
            window: match model.phi3.window {
                Some(window) if window > 0 => window as usize,
                _ => usize::MAX,
            },
            divisors: factors.iter().enumerate().map(frequency).collect(),
            magnitude,
            tensors,
        }
    }

    /// Multiplies rows with some rows of a tensor.
    fn times(&self, x: &Matrix, name: &str, first: usize, rows: usize) -> Matrix {
        let (columns, values) = &self.tensors[name];
        let weights = |row: usize| &values[(first + row) * columns..(first + row + 1) * columns];
        let dot = |x: &[f64], row: usize| {
            let terms = x.iter().zip(weights(row));
            terms.map(|(x, weight)| x * f64::from(*weight)).sum()
        };
        let row = |x: &Vec<f64>| (0..rows).map(|row| dot(x, row)).collect();
        x.iter().map(row).collect()
    }

    fn norm(&self, x: &Matrix, name: &str) -> Matrix {
        let (_, weights) = &self.tensors[name];
        let row = |x: &Vec<f64>| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + 1e-5f32 as f64).sqrt();
            let scaled = x.iter().zip(weights);
            scaled
                .map(|(x, weight)| x * scale * f64::from(*weight))
                .collect()
        };
        x.iter().map(row).collect()
    }

    /// Rotates the leading elements of each head of a position.
    fn turn(&self, row: &mut [f64], position: usize) {
        let pairs = PHI3_ROPE_DIM / 2;
        for head in row.chunks_exact_mut(HEAD_DIM) {
            for (pair, divisor) in self.divisors.iter().enumerate() {
                let angle = position as f64 / divisor;
                let (cosine, sine) = (angle.cos() * self.magnitude, angle.sin() * self.magnitude);
                let (x, y) = (head[pair], head[pair + pairs]);
                head[pair] = x * cosine - y * sine;
                head[pair + pairs] = y * cosine + x * sine;
            }
        }
    }

    fn attention(&self, x: &Matrix, block: usize) -> Matrix {
        let name = |part: &str| format!("blk.{block}.{part}.weight");
        let (queries, kvs) = (HEADS * HEAD_DIM, self.kv_heads * HEAD_DIM);
        let [mut q, mut k, v] = if self.tensors.contains_key(&name("attn_qkv")) {
            [(0, queries), (queries, kvs), (queries + kvs, kvs)]
                .map(|(first, rows)| self.times(x, &name("attn_qkv"), first, rows))
        } else {
            [("attn_q", queries), ("attn_k", kvs), ("attn_v", kvs)]
                .map(|(part, rows)| self.times(x, &name(part), 0, rows))
        };
        for rows in [&mut q, &mut k] {
            for (position, row) in rows.iter_mut().enumerate() {
                self.turn(row, position);
            }
        }
        let mut mixed = vec![vec![0.0; queries]; x.len()];
        for (position, mixed) in mixed.iter_mut().enumerate() {
            let from = (position + 1).saturating_sub(self.window);
            for head in 0..HEADS {
                let own = head * HEAD_DIM..(head + 1) * HEAD_DIM;
                let shared = head * self.kv_heads / HEADS * HEAD_DIM;
                let shared = shared..shared + HEAD_DIM;
                let score = |at: usize| {
                    let terms = q[position][own.clone()].iter().zip(&k[at][shared.clone()]);
                    terms.map(|(q, k)| q * k).sum::<f64>() / (HEAD_DIM as f64).sqrt()
                };
                let weights: Vec<f64> = (from..=position).map(|at| score(at).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (at, weight) in (from..=position).zip(weights) {
                    let values = &v[at][shared.clone()];
                    for (mixed, value) in mixed[own.clone()].iter_mut().zip(values) {
                        *mixed += weight / sum * value;
                    }
                }
            }
        }
        self.times(&mixed, &name("attn_output"), 0, WIDTH)
    }

    fn feed_forward(&self, x: &Matrix, block: usize) -> Matrix {
        let name = |part: &str| format!("blk.{block}.{part}.weight");
        let is_split = self.tensors.contains_key(&name("ffn_gate"));
        let (gate, first) = if is_split {
            ("ffn_gate", 0)
        } else {
            ("ffn_up", self.inner)
        };
        let mut gates = self.times(x, &name(gate), 0, self.inner);
        let ups = self.times(x, &name("ffn_up"), first, self.inner);
        for (gate, up) in gates.iter_mut().flatten().zip(ups.into_iter().flatten()) {
            *gate *= up / (1.0 + (-*gate).exp());
        }
        self.times(&gates, &name("ffn_down"), 0, WIDTH)
    }

    fn logits(&self, tokens: &[u32]) -> Matrix {
        let (columns, embedding) = &self.tensors["token_embd.weight"];
        let row = |token: &u32| {
            let row = &embedding[*token as usize * columns..][..*columns];
            row.iter().copied().map(f64::from).collect()
        };
        let mut x: Matrix = tokens.iter().map(row).collect();
        for block in 0..self.blocks {
            let normed = self.norm(&x, &format!("blk.{block}.attn_norm.weight"));
            add(&mut x, &self.attention(&normed, block));
            let normed = self.norm(&x, &format!("blk.{block}.ffn_norm.weight"));
            add(&mut x, &self.feed_forward(&normed, block));
        }
        let x = self.norm(&x, "output_norm.weight");
        let output = match self.tensors.contains_key("output.weight") {
            true => "output.weight",
            false => "token_embd.weight",
        };
        self.times(&x, output, 0, embedding.len() / columns)
    }
}

fn add(x: &mut Matrix, y: &Matrix) {
    for (x, y) in x.iter_mut().flatten().zip(y.iter().flatten()) {
        *x += y;
    }
}

/// Returns the error relative to `expected`.
fn error(found: &Matrix, expected: &Matrix) -> f64 {
    let rows = || found.iter().flatten().zip(expected.iter().flatten());
    let difference: f64 = rows().map(|(a, b)| (a - b) * (a - b)).sum();
    let norm: f64 = rows().map(|(_, b)| b * b).sum();
    (difference / norm).sqrt()
}

// [CAND-091]
#[test]
fn every_feature_is_computed_as_described() {
    let tokens = tokens(80);
    for case in cases() {
        let expected = Reference::of(&case).logits(&tokens);
        let exact = error(&logits(&case.engine(Device::Reference), &tokens), &expected);
        let ours = error(&logits(&case.engine(support::cpu()), &tokens), &expected);
        assert!(exact < 1e-5, "{case:?}: candle's error is {exact}");
        // Keys and values are half-precision floats here.
        assert!(ours < 5e-3, "{case:?}: the error is {ours}");
    }
}

// [CAND-011] [CAND-014]
#[test]
fn bits_are_the_same_however_a_sequence_is_computed() {
    let tokens = tokens(80);
    for case in cases() {
        let bits = |threads, tier, chunk: usize| {
            let engine = case.engine(Device::Cpu { threads, tier });
            let mut sequence = engine.sequence(tokens.len()).unwrap();
            let chunks = tokens.chunks(chunk);
            let logits = chunks.map(|tokens| sequence.logits(tokens).unwrap()).last();
            logits
                .unwrap()
                .into_iter()
                .map(f32::to_bits)
                .collect::<Vec<_>>()
        };
        let expected = bits(1, Tier::Portable, 1);
        for tier in Tier::available() {
            for (threads, chunk) in [(1, 80), (2, 33), (3, 7)] {
                let found = bits(threads, tier, chunk);
                assert_eq!(found, expected, "{case:?}, {tier:?}, {threads}, {chunk}");
            }
        }
    }
}

// [CAND-091]
#[test]
fn the_window_is_the_files_unless_the_model_has_no_more_positions() {
    let window = |context, window| {
        let phi3 = Phi3 {
            window,
            ..Phi3::default()
        };
        let mut case = Case::new(phi3, 1024);
        case.model.context = context;
        let engine = case.engine(support::cpu());
        let layers = &engine.description().layers;
        assert!(layers.iter().all(|layer| *layer == layers[0]));
        layers[0].window
    };
    assert_eq!(window(1024, Some(1023)), Some(1023));
    for none in [None, Some(0), Some(1024), Some(262_144), Some(u32::MAX)] {
        assert_eq!(window(1024, none), None, "{none:?}");
    }
    // Files of models with 4096 tokens of context that predate the key.
    assert_eq!(window(4096, None), Some(2047));
    assert_eq!(window(4096, Some(0)), None);
}

// [CAND-065] [CAND-091]
#[test]
fn results_for_a_long_context_are_of_another_build() {
    let long = Phi3 {
        original_context: Some(256),
        ..Phi3::default()
    };
    let build = |phi3, context| {
        let engine = Case::new(phi3, context).engine(support::cpu());
        engine.origin().build.clone()
    };
    let plain = build(Phi3::default(), 1024);
    assert_eq!(build(long, 256), plain);
    assert_eq!(build(long, 257), format!("{plain}, long context"));
}
