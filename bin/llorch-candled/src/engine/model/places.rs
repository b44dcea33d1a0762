//! Where a model's weights stand in its file.

use super::description::Description;

/// A matrix of a model file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the tensor.
    pub name: String,
    /// Number of rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

/// The embedding, and the output matrix of files that have no other.
pub const EMBEDDING: &str = "token_embd.weight";
/// The output matrix.
pub const OUTPUT: &str = "output.weight";
/// Weights of the last norm.
pub const OUTPUT_NORM: &str = "output_norm.weight";
/// Factors that divide the frequencies of rotations (Llama 3.1 and later).
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Matrices of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlaces {
    /// Queries.
    pub query: Place,
    /// Keys.
    pub key: Place,
    /// Values.
    pub value: Place,
    /// Result of the attention.
    pub output: Place,
    /// Gate of the feed-forward.
    pub gate: Place,
    /// Up-projection.
    pub up: Place,
    /// Down-projection.
    pub down: Place,
}

/// Returns the name of a layer's tensor.
pub fn in_layer(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}")
}

impl Description {
    /// Returns the width of all queries of a position.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of all keys of a position, and of its values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the places of a layer's matrices.
    pub fn layer_places(&self, layer: usize) -> LayerPlaces {
        let (width, inner) = (self.width, self.feed_forward);
        let (queries, kvs) = (self.query_width(), self.kv_width());
        let place = |part: &str, rows, columns| Place {
            name: in_layer(layer, &format!("{part}.weight")),
            rows,
            columns,
        };
        LayerPlaces {
            query: place("attn_q", queries, width),
            key: place("attn_k", kvs, width),
            value: place("attn_v", kvs, width),
            output: place("attn_output", width, queries),
            gate: place("ffn_gate", inner, width),
            up: place("ffn_up", inner, width),
            down: place("ffn_down", width, inner),
        }
    }

    /// Returns the place of the embedding.
    pub fn embedding_place(&self) -> Place {
        self.vocabulary_place(EMBEDDING)
    }

    /// Returns the place of the output matrix, if it is another than the embedding.
    pub fn output_place(&self) -> Place {
        self.vocabulary_place(OUTPUT)
    }

    fn vocabulary_place(&self, name: &str) -> Place {
        Place {
            name: name.to_owned(),
            rows: self.vocab,
            columns: self.width,
        }
    }
}
