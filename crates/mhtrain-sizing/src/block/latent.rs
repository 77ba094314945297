//! What does latent attention take and give back, in order?
//!
//! Source: `DeepseekV3Attention.forward` in `modeling_deepseek_v3.py` of transformers 5.19; GLM-4.7-Flash has the same, and
//! DeepSeek V2 but for the rotation.

use super::{Lists, float};
use crate::model::{AttentionBias, Latent, Layer, Rotary};
use crate::tape::{Rotation, Tape, Tensor};

impl Lists<'_> {
    /// `DeepseekV3Attention.forward`: queries, keys and values out of narrow products, with a part of the key that all
    /// heads share.
    pub(super) fn latent_attention(
        &self,
        tape: &mut Tape,
        x: Tensor,
        layer: Layer,
        tables: [Tensor; 2],
        latent: &Latent,
    ) -> Tensor {
        let bias = self.shape.attention_bias != AttentionBias::None;
        let heads = float(self.shape.heads);
        let (plain, turning) = (float(latent.plain), float(latent.rotated));
        let (rank, width) = (float(latent.rank), float(latent.value));
        let product = match latent.query_rank.map(float) {
            None => self.linear(tape, x, [self.h, self.q], false, self.adapted.q),
            Some(rank) => {
                let narrow = self.linear(tape, x, [self.h, rank], bias, self.adapted.query_in);
                let normal = self.replaced_by(tape, narrow, rank);
                let product = self.linear(tape, normal, [rank, self.q], false, self.adapted.query_out);
                tape.drop(normal);
                product
            }
        };
        let product = self.by_head(tape, product, heads);
        let each = self.tokens * heads;
        let [q_plain, q_turning] = tape.split(product, [each * plain, each * turning]);
        let narrow = self.linear(tape, x, [self.h, rank + turning], bias, self.adapted.latent_in);
        let [compressed, k_turning] = tape.split(narrow, [self.tokens * rank, self.tokens * turning]);
        let normal = self.norm(tape, compressed, rank);
        tape.drop(compressed);
        let both = [q_turning, k_turning];
        let [q_turned, k_turned] = match self.shape.style.rotary {
            Rotary::PairsApart => tape.rotate_pairs_apart(both, tables),
            Rotary::Complex => tape.rotate_complex(both, heads, tables[0]),
            _ => both.map(|part| tape.rotate(part, Rotation::Whole, tables)),
        };
        for part in both {
            tape.drop(part);
        }
        let q = tape.joined([q_plain, q_turned], None);
        tape.drop(q_plain);
        // `expand_kv`.
        let sizes = [rank, heads * (plain + width)];
        let made = self.linear(tape, normal, sizes, false, self.adapted.latent_out);
        let made = self.by_head(tape, made, heads);
        let [k_plain, v] = tape.split(made, [each * plain, each * width]);
        tape.drop(made);
        let spread = tape.spread(k_turned, each * turning);
        let empty = tape.plain(q.n, q.width);
        let half = tape.written(empty, k_plain);
        let k = tape.written(half, spread);
        tape.drop(k_plain);
        tape.drop(spread);
        let attended = self.scores(tape, [q, k, v], layer);
        let out = self.linear(tape, attended, [heads * width, self.h], bias, self.adapted.output);
        for tensor in [attended, q, k, v, k_turned, q_turned, normal, narrow, product] {
            tape.drop(tensor);
        }
        out
    }
}
