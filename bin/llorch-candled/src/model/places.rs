//! Locations of a model's weights in its file.

use super::description::Description;

/// A matrix in a model file: a tensor, or some rows of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the tensor.
    pub name: String,
    /// First row of the matrix in the tensor.
    pub first: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of rows of the tensor.
    pub tensor_rows: usize,
    /// Number of columns.
    pub columns: usize,
}

impl Place {
    /// Returns the place of a whole tensor.
    fn whole(name: String, rows: usize, columns: usize) -> Self {
        Self {
            name,
            first: 0,
            rows,
            tensor_rows: rows,
            columns,
        }
    }

    /// Returns the places of matrices that are stacked in one tensor, in order, with these numbers of rows.
    fn stacked<const N: usize>(name: &str, rows: [usize; N], columns: usize) -> [Self; N] {
        let tensor_rows = rows.iter().sum();
        let mut end = 0;
        rows.map(|rows| {
            let first = end;
            end += rows;
            Self {
                name: name.to_owned(),
                first,
                rows,
                tensor_rows,
                columns,
            }
        })
    }
}

/// Name of the embedding, which is also the output matrix in files without [`OUTPUT`].
pub const EMBEDDING: &str = "token_embd.weight";
/// Name of the output matrix.
pub const OUTPUT: &str = "output.weight";
/// Name of the weights of the last norm.
pub const OUTPUT_NORM: &str = "output_norm.weight";
/// Name of the factors that divide the frequencies of rotations (Llama 3.1 and later).
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The places of a layer's matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlaces {
    /// Projection to queries.
    pub query: Place,
    /// Projection to keys.
    pub key: Place,
    /// Projection to values.
    pub value: Place,
    /// Projection of the attention's result.
    pub output: Place,
    /// Gate of the feed-forward layer.
    pub gate: Place,
    /// Up-projection of the feed-forward layer.
    pub up: Place,
    /// Down-projection of the feed-forward layer.
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

    /// Returns the width of all keys of a position, which is also that of its values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the places of a layer's matrices.
    pub fn layer_places(&self, layer: usize) -> LayerPlaces {
        let (width, inner) = (self.width, self.feed_forward);
        let (queries, kvs) = (self.query_width(), self.kv_width());
        let kind = self.layers[layer];
        let name = |part: &str| in_layer(layer, &format!("{part}.weight"));
        let whole = |part: &str, rows, columns| Place::whole(name(part), rows, columns);
        let [query, key, value] = if kind.fused_attention {
            Place::stacked(&name("attn_qkv"), [queries, kvs, kvs], width)
        } else {
            let parts = [("attn_q", queries), ("attn_k", kvs), ("attn_v", kvs)];
            parts.map(|(part, rows)| whole(part, rows, width))
        };
        let [gate, up] = if kind.fused_gate {
            Place::stacked(&name("ffn_up"), [inner, inner], width)
        } else {
            ["ffn_gate", "ffn_up"].map(|part| whole(part, inner, width))
        };
        LayerPlaces {
            query,
            key,
            value,
            output: whole("attn_output", width, queries),
            gate,
            up,
            down: whole("ffn_down", width, inner),
        }
    }

    /// Returns the place of the embedding.
    pub fn embedding_place(&self) -> Place {
        self.vocabulary_place(EMBEDDING)
    }

    /// Returns the place of an output matrix that is separate from the embedding.
    pub fn output_place(&self) -> Place {
        self.vocabulary_place(OUTPUT)
    }

    fn vocabulary_place(&self, name: &str) -> Place {
        Place::whole(name.to_owned(), self.vocab, self.width)
    }
}
