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

/// A vector in a model file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VectorPlace {
    /// Name of the tensor.
    pub name: String,
    /// Number of elements.
    pub length: usize,
}

/// Name of the embedding, which is also the output matrix in files without [`OUTPUT`].
const EMBEDDING: &str = "token_embd.weight";
/// Name of the output matrix.
pub const OUTPUT: &str = "output.weight";
/// Name of the weights of the last norm.
const OUTPUT_NORM: &str = "output_norm.weight";
/// Name of the factors that divide the frequencies of rotations (Llama 3.1 and later).
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The places of a layer's weights. The optional ones depend on the family's [`Features`](super::description::Features).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlaces {
    /// Weights of the norm before attention.
    pub attention_norm: VectorPlace,
    /// Projection to queries.
    pub query: Place,
    /// Bias of the queries.
    pub query_bias: Option<VectorPlace>,
    /// Weights of the norm of each query head.
    pub query_norm: Option<VectorPlace>,
    /// Projection to keys.
    pub key: Place,
    /// Bias of the keys.
    pub key_bias: Option<VectorPlace>,
    /// Weights of the norm of each key head.
    pub key_norm: Option<VectorPlace>,
    /// Projection to values.
    pub value: Place,
    /// Bias of the values.
    pub value_bias: Option<VectorPlace>,
    /// Projection of the attention's result.
    pub output: Place,
    /// Weights of the norm after attention.
    pub attention_post_norm: Option<VectorPlace>,
    /// Weights of the norm before the feed-forward layer.
    pub feed_forward_norm: VectorPlace,
    /// Gate of the feed-forward layer.
    pub gate: Place,
    /// Up-projection of the feed-forward layer.
    pub up: Place,
    /// Down-projection of the feed-forward layer.
    pub down: Place,
    /// Weights of the norm after the feed-forward layer.
    pub feed_forward_post_norm: Option<VectorPlace>,
}

/// Returns the name of a layer's tensor.
pub(super) fn in_layer(layer: usize, part: &str) -> String {
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

    /// Returns the places of a layer's weights.
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
        let features = self.features;
        let bias = |part: &str, length| {
            let name = in_layer(layer, &format!("{part}.bias"));
            let place = VectorPlace { name, length };
            features.attention_bias.then_some(place)
        };
        let norm = |part: &str, length| VectorPlace {
            name: name(part),
            length,
        };
        let head_norm = |part| features.qk_norm.then(|| norm(part, self.head_dim));
        let post_norm = |part| features.post_norm.then(|| norm(part, width));
        LayerPlaces {
            attention_norm: norm("attn_norm", width),
            query,
            query_bias: bias("attn_q", queries),
            query_norm: head_norm("attn_q_norm"),
            key,
            key_bias: bias("attn_k", kvs),
            key_norm: head_norm("attn_k_norm"),
            value,
            value_bias: bias("attn_v", kvs),
            output: whole("attn_output", width, queries),
            attention_post_norm: post_norm("post_attention_norm"),
            feed_forward_norm: norm("ffn_norm", width),
            gate,
            up,
            down: whole("ffn_down", width, inner),
            feed_forward_post_norm: post_norm("post_ffw_norm"),
        }
    }

    /// Returns the place of the weights of the last norm.
    pub fn output_norm_place(&self) -> VectorPlace {
        VectorPlace {
            name: OUTPUT_NORM.to_owned(),
            length: self.width,
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
