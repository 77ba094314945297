//! What does each operation of a forward pass take, and what does it keep for the way back?
//!
//! One function for each: the tensors that it makes, in the order in which the kernel or the Python code makes them, and
//! the [`Rule`] of its way back with what is saved for it. Parameters are described at the end.

use super::backward::Rule;
use super::{NONE, Tape, Tensor};
use crate::model::Rotary;

impl Tape {
    /// `x.to(width)`; `x` itself when it has that width.
    pub(crate) fn cast(&mut self, x: Tensor, width: f64) -> Tensor {
        if x.width == width {
            return self.hold(x);
        }
        self.result(x.n, width, Rule::New(x.bytes()), [x.node, NONE, NONE], [])
    }

    /// Autocast's copy of a parameter of `n` elements of `width`, cached until the forward pass is left.
    pub(crate) fn weight_copy(&mut self, n: f64, width: f64, to: f64, trains: bool) -> Tensor {
        let leaf = self.leaf(trains);
        let copy = self.result(n, to, Rule::New(n * width), [leaf, NONE, NONE], []);
        if trains {
            let id = self.retain(copy.storage);
            self.cached.push(id);
        }
        copy
    }

    /// A parameter of `n` elements of `width` lifted to fp32 by the model's own code.
    pub(crate) fn lifted_parameter(&mut self, n: f64, width: f64, trains: bool) -> Tensor {
        let leaf = self.leaf(trains);
        self.result(n, 4.0, Rule::New(n * width), [leaf, NONE, NONE], [])
    }

    /// `n` elements that are looked up in a table.
    pub(crate) fn embedding(&mut self, n: f64, table: Parameter) -> Tensor {
        let leaf = self.leaf(table.trains);
        self.result(n, table.width, Rule::New(table.n * table.width), [leaf, NONE, NONE], [])
    }

    /// Sum over `k` neighbours.
    pub(crate) fn sum_over(&mut self, x: Tensor, k: f64) -> Tensor {
        self.result(x.n / k, x.width, Rule::New(x.bytes()), [x.node, NONE, NONE], [])
    }

    /// Liger's fused head and loss: the gradient of its input, and of its weight when it trains, are made in the forward
    /// pass and kept.
    pub(crate) fn liger(&mut self, x: Tensor, weight: Option<f64>, tied: bool) -> Tensor {
        let input = self.plain(x.n, x.width);
        let mut out = self.plain(1.0, 4.0);
        self.tied = tied;
        let weight = weight.map(|bytes| (self.plain(bytes, 1.0), self.leaf(true)));
        self.tied = false;
        if let Some((made, leaf)) = weight {
            out = self.link(out, Rule::Made, [leaf, x.node, NONE], [made, input]);
            self.drop(made);
        } else {
            out = self.link(out, Rule::Made, [NONE, x.node, NONE], [input, input]);
        }
        self.drop(input);
        out
    }

    /// An operation whose backward formula makes one tensor of the size of `x` out of the gradient and of what is saved.
    pub(crate) fn unary(&mut self, x: Tensor, saved: Saved) -> Tensor {
        let out = self.plain(x.n, x.width);
        let kept = match saved {
            Saved::Nothing => None,
            Saved::Input => Some(x),
            Saved::Output => Some(out),
        };
        self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], kept)
    }

    /// `x` in another order or of another kind, whose gradient takes a copy of the same size.
    pub(crate) fn copied_back(&mut self, x: Tensor) -> Tensor {
        let mut out = self.hold(x);
        out.node = NONE;
        out = self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], []);
        out
    }

    /// `a + b`, of the wider type; both get the same gradient.
    pub(crate) fn add(&mut self, a: Tensor, b: Tensor) -> Tensor {
        self.result(a.n, a.width.max(b.width), Rule::Pass, [a.node, b.node, NONE], [])
    }

    /// `x * factor`, a number.
    pub(crate) fn scale(&mut self, x: Tensor) -> Tensor {
        self.unary(x, Saved::Nothing)
    }

    /// `a * b`; a smaller one of the two is spread, and its gradient summed.
    pub(crate) fn multiply(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let n = a.n.max(b.n);
        let width = a.width.max(b.width);
        // A gradient is summed to fewer elements, or cast to a narrower type.
        let sum = |x: Tensor| match x {
            _ if x.n < n => x.n * width,
            _ if x.width < width => x.bytes(),
            _ => 0.0,
        };
        let rule = Rule::Product { full: n * width, sums: [sum(a), sum(b)] };
        let mut out = self.plain(n, width);
        match (a.needs_gradient(), b.needs_gradient()) {
            (true, true) => out = self.link(out, rule, [a.node, b.node, NONE], [a, b]),
            (true, false) => out = self.link(out, rule, [a.node, NONE, NONE], [b]),
            (false, true) => out = self.link(out, rule, [NONE, b.node, NONE], [a]),
            (false, false) => {}
        }
        out
    }

    /// `weight * x` with a parameter of `weight_n` elements; `x` is kept only if it trains.
    pub(crate) fn multiply_by_parameter(&mut self, x: Tensor, parameter: Parameter) -> Tensor {
        let width = x.width.max(parameter.width);
        let full = x.n * width;
        let rule = Rule::Product { full, sums: [parameter.n * width, 0.0] };
        let out = self.plain(x.n, width);
        let leaf = self.leaf(parameter.trains);
        self.link(out, rule, [leaf, x.node, NONE], parameter.trains.then_some(x))
    }

    /// `x.pow(2)`.
    pub(crate) fn square(&mut self, x: Tensor) -> Tensor {
        self.power(x)
    }

    /// `x.pow(p)`, whatever the number is.
    pub(crate) fn power(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::Power(x.bytes()), [x.node, NONE, NONE], [x])
    }

    /// Mean over the last dimension, `rows` of which are left.
    pub(crate) fn mean(&mut self, x: Tensor, rows: f64) -> Tensor {
        self.result(rows, x.width, Rule::New(x.bytes()), [x.node, NONE, NONE], [])
    }

    /// `x + epsilon`.
    pub(crate) fn plus_number(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::Pass, [x.node, NONE, NONE], [])
    }

    /// `x - y`, `y` one number for each row of `x`.
    pub(crate) fn minus(&mut self, x: Tensor, y: Tensor) -> Tensor {
        let rule = Rule::Difference { full: x.bytes(), sum: y.bytes() };
        self.result(x.n, x.width, rule, [x.node, y.node, NONE], [])
    }

    /// Where the gradient of a parameter goes; `None` when it is frozen.
    pub(crate) fn leaf_if(&self, parameter: Parameter) -> Option<u32> {
        Some(self.leaf(parameter.trains)).filter(|leaf| *leaf != NONE)
    }

    /// `x * x`.
    pub(crate) fn times_itself(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::OwnProduct(x.bytes()), [x.node, NONE, NONE], [x])
    }

    /// Sum over the last dimension, `rows` of which are left: its gradient is spread as a view.
    pub(crate) fn sum_of_rows(&mut self, x: Tensor, rows: f64) -> Tensor {
        self.result(rows, x.width, Rule::Pass, [x.node, NONE, NONE], [])
    }

    /// `a + b` of as many elements: the gradient of the narrower `b` is cast back.
    pub(crate) fn add_narrow(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let narrow = if b.needs_gradient() && b.width < a.width { b.bytes() } else { 0.0 };
        self.result(a.n, a.width, Rule::Sum(narrow), [a.node, b.node, NONE], [])
    }

    /// `x + parameter`, a number of it for each row.
    pub(crate) fn plus_parameter(&mut self, x: Tensor, parameter: Parameter) -> Tensor {
        let leaf = self.leaf(parameter.trains);
        let sum = if parameter.trains { parameter.n * parameter.width } else { 0.0 };
        self.result(x.n, x.width, Rule::Sum(sum), [x.node, leaf, NONE], [])
    }

    /// `a - b` of as many elements: the gradient of the narrower `b` is cast back.
    pub(crate) fn minus_narrow(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let rule = Rule::Difference {
            full: if b.needs_gradient() { a.bytes() } else { 0.0 },
            sum: if b.width < a.width { b.bytes() } else { 0.0 },
        };
        self.result(a.n, a.width, rule, [a.node, b.node, NONE], [])
    }

    /// All pairs of `x - y` along one dimension, `n` of them; either gradient is summed.
    pub(crate) fn pairs_apart(&mut self, x: Tensor, y: Tensor, n: f64) -> Tensor {
        let rule =
            Rule::Pairs { full: n * x.width, sums: [x, y].map(|of| if of.n < n { of.bytes() } else { 0.0 }) };
        self.result(n, x.width, rule, [x.node, y.node, NONE], [])
    }

    /// `x` in a tensor of its own that is larger, or in another order: the gradient takes a tensor of the old size.
    pub(crate) fn made_anew(&mut self, x: Tensor, n: f64) -> Tensor {
        self.result(n, x.width, Rule::New(x.bytes()), [x.node, NONE, NONE], [])
    }

    /// `x.clone()`: the gradient goes on as it is.
    pub(crate) fn cloned(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::Pass, [x.node, NONE, NONE], [])
    }

    /// Two tensors beside each other in a new one (`cat`), or three: each gets its part of the gradient as a view.
    pub(crate) fn joined(&mut self, [a, b]: [Tensor; 2], third: Option<Tensor>) -> Tensor {
        let (n, width, node) = third.map_or((0.0, 0.0, NONE), |part| (part.n, part.width, part.node));
        let width = a.width.max(b.width).max(width);
        self.result(a.n + b.n + n, width, Rule::Pass, [a.node, b.node, node], [])
    }

    /// `x` spread to `n` elements as a view: its gradient is summed.
    pub(crate) fn spread(&mut self, x: Tensor, n: f64) -> Tensor {
        let mut out = self.hold(x).view(n);
        out.node = NONE;
        self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], [])
    }

    /// `x.cumsum()`.
    pub(crate) fn running_sum(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::Power(x.bytes()), [x.node, NONE, NONE], [])
    }

    /// `x.masked_fill(mask, number)`.
    pub(crate) fn masked(&mut self, x: Tensor, mask: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::New(x.bytes()), [x.node, NONE, NONE], [mask])
    }

    /// `a @ b` of two activations, `n` elements; with `narrow` both are cast to that width first (autocast).
    pub(crate) fn product_of(&mut self, a: Tensor, b: Tensor, n: f64, narrow: Option<f64>) -> Tensor {
        let width = narrow.unwrap_or(a.width);
        let b = self.cast(b, width);
        let a = self.cast(a, width);
        let bytes = |x: Tensor| if x.needs_gradient() { x.bytes() } else { 0.0 };
        let rule = Rule::Pair { first: bytes(a), second: bytes(b) };
        let kept = [b.needs_gradient().then_some(a), a.needs_gradient().then_some(b)];
        let out = self.result(n, width, rule, [a.node, b.node, NONE], kept.into_iter().flatten());
        self.drop(a);
        self.drop(b);
        out
    }

    /// `linalg.solve_triangular(a, b)`.
    pub(crate) fn solved(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let out = self.plain(b.n, b.width);
        let system = if a.needs_gradient() { a.bytes() } else { 0.0 };
        self.link(out, Rule::Solve { system, right: b.bytes() }, [a.node, b.node, NONE], [a, out])
    }

    /// `x[part] = y`, in place: `x` as it is after that.
    pub(crate) fn written(&mut self, x: Tensor, y: Tensor) -> Tensor {
        let narrow = if y.width < x.width { y.bytes() } else { 0.0 };
        let rule = Rule::Written { all: x.bytes(), part: y.n * x.width, narrow };
        self.link(x, rule, [x.node, y.node, NONE], [])
    }

    /// Keeps `bytes` until the way back comes to what was made before; for what is not put on the tape one by one.
    pub(crate) fn keep_until_here(&mut self, bytes: f64) {
        if !self.recording || bytes <= 0.0 {
            return;
        }
        let lump = self.plain(bytes, 1.0);
        self.node(Rule::Pass, [NONE; 3], [lump]);
        self.drop(lump);
    }

    /// `1 + parameter`.
    pub(crate) fn raised_parameter(&mut self, parameter: Parameter) -> Tensor {
        let leaf = self.leaf(parameter.trains);
        self.result(parameter.n, parameter.width, Rule::Pass, [leaf, NONE, NONE], [])
    }

    /// torch's layer norm over `rows` rows: keeps its input, and a mean and a deviation for each. `parameters` are where
    /// the gradients of weight and bias go, `size` elements each.
    pub(crate) fn layer_norm(
        &mut self,
        x: Tensor,
        rows: f64,
        parameters: [Option<u32>; 2],
        size: f64,
    ) -> Tensor {
        let out = self.plain(x.n, x.width);
        let statistics = [self.plain(rows, x.width), self.plain(rows, x.width)];
        let [weight, bias] = parameters.map(|node| node.unwrap_or(NONE));
        let bytes = |node: u32| if node == NONE { 0.0 } else { size * x.width };
        let rule = Rule::LayerNorm {
            input: if x.needs_gradient() { x.bytes() } else { 0.0 },
            weight: bytes(weight),
            bias: bytes(bias),
        };
        let saved = [x, statistics[0], statistics[1]];
        let out = self.link(out, rule, [x.node, weight, bias], saved);
        for tensor in statistics {
            self.drop(tensor);
        }
        out
    }

    /// A layer norm without bias for each head, and their results joined (`StableLmLayerNormPerHead`).
    pub(crate) fn layer_norms(&mut self, x: Tensor, heads: f64, size: f64, parameter: Parameter) -> Tensor {
        // The heads share the storage, and their gradients come together again.
        let mut split = Tensor { node: NONE, ..x };
        split = self.link(split, Rule::Gather(x.bytes()), [x.node, NONE, NONE], []);
        let leaf = self.leaf_if(parameter);
        let n = x.n / heads;
        let mut parts = Vec::new();
        let mut head = 0.0;
        while head < heads {
            parts.push(self.layer_norm(split.view(n), n / size, [leaf, None], size));
            head += 1.0;
        }
        let mut out = self.plain(x.n, x.width);
        let first = parts.first().map_or(NONE, |part| part.node);
        let last = parts.last().map_or(NONE, |part| part.node);
        if first != NONE {
            out = self.link(out, Rule::Spread { first, last }, [last, NONE, NONE], []);
        }
        for part in parts {
            self.drop(part);
        }
        out
    }

    /// `x * table`, of the wider type; the gradient is cast back.
    fn times_table(&mut self, x: Tensor, table: Tensor) -> Tensor {
        let width = x.width.max(table.width);
        let rule = if width > x.width {
            Rule::Narrow { wide: x.n * width, narrow: x.bytes() }
        } else {
            Rule::New(x.bytes())
        };
        self.result(x.n, width, rule, [x.node, NONE, NONE], [table])
    }

    /// `rotate_half(x)`: one half negated, both joined in the other order.
    fn turned(&mut self, x: Tensor) -> Tensor {
        let first = self.slice(x, x.n / 2.0);
        let second = self.slice(x, x.n / 2.0);
        let negative = self.scale(second);
        self.drop(second);
        let out = self.result(x.n, x.width, Rule::Pass, [negative.node, first.node, NONE], []);
        self.drop(negative);
        self.drop(first);
        out
    }

    /// `(x * cos + rotate_half(x) * sin)` in fp32, cast back when query and key are both there.
    ///
    /// Source: `apply_rotary_pos_emb` of OLMo, Cohere and ERNIE 4.5.
    pub(crate) fn rotate_lifted(
        &mut self,
        both: [Tensor; 2],
        kind: Rotary,
        tables: [Tensor; 2],
    ) -> [Tensor; 2] {
        // Cohere lifts first.
        let early = both.map(|x| if kind == Rotary::Lifted { self.cast(x, 4.0) } else { self.hold(x) });
        let wide = early.map(|x| {
            let apart = kind == Rotary::LiftedApart;
            let lifted = if apart { self.cast(x, 4.0) } else { self.hold(x) };
            let straight = self.times_table(lifted, tables[0]);
            self.drop(lifted);
            let mut turned = self.turned(x);
            if apart {
                let lifted = self.cast(turned, 4.0);
                self.drop(turned);
                turned = lifted;
            }
            let crossed = self.times_table(turned, tables[1]);
            self.drop(turned);
            let out = self.add(straight, crossed);
            self.drop(straight);
            self.drop(crossed);
            out
        });
        let out = [0, 1].map(|index: usize| self.cast(wide[index], both[index].width));
        for tensor in early.into_iter().chain(wide) {
            self.drop(tensor);
        }
        out
    }

    /// Even and odd elements of query and key, multiplied and joined as halves: `(a * cos - b * sin, b * cos + a * sin)`.
    ///
    /// Source: `apply_rotary_pos_emb_interleave` of DeepSeek V3.
    pub(crate) fn rotate_pairs_apart(&mut self, both: [Tensor; 2], tables: [Tensor; 2]) -> [Tensor; 2] {
        let cut = both.map(|x| [self.slice(x, x.n / 2.0), self.slice(x, x.n / 2.0)]);
        cut.map(|[even, odd]| {
            let a = self.times_table(even, tables[0]);
            let b = self.times_table(odd, tables[1]);
            let first = self.minus_narrow(a, b);
            self.drop(a);
            self.drop(b);
            let a = self.times_table(odd, tables[0]);
            let b = self.times_table(even, tables[1]);
            let second = self.add(a, b);
            self.drop(a);
            self.drop(b);
            let out = self.joined([first, second], None);
            for tensor in [first, second, even, odd] {
                self.drop(tensor);
            }
            out
        })
    }

    /// Pairs of query and key, in which `heads` lie beside each other and not one, as complex numbers of fp32 times a table of
    /// such.
    ///
    /// Source: `apply_rotary_emb` of DeepSeek V2.
    pub(crate) fn rotate_complex(&mut self, both: [Tensor; 2], heads: f64, table: Tensor) -> [Tensor; 2] {
        let wide = both.map(|x| self.cast(x, 4.0));
        let out = [(0, heads), (1, 1.0)].map(|(index, heads): (usize, f64)| {
            let x = wide[index];
            let rule = Rule::Conjugate { table: table.bytes(), new: x.bytes() };
            let mut turned = self.result(x.n, x.width, rule, [x.node, NONE, NONE], [table]);
            if heads > 1.0 {
                let copied = self.copied_back(turned);
                self.drop(turned);
                turned = copied;
            }
            let narrow = self.cast(turned, both[index].width);
            self.drop(turned);
            narrow
        });
        for tensor in wide {
            self.drop(tensor);
        }
        out
    }

    /// xIELU in Python: `where(x > 0, a * x * x + b * x, (expm1(min(x, e)) - x) * c + b * x)`, `a` and `c` made of one
    /// parameter each.
    ///
    /// Source: `XIELUActivation._xielu_python` of transformers 5.19.
    pub(crate) fn xielu(&mut self, x: Tensor, parameter: Parameter) -> Tensor {
        let leaf = self.leaf(parameter.trains);
        let slope = |tape: &mut Tape| {
            tape.result(1.0, parameter.width, Rule::New(parameter.width), [leaf, NONE, NONE], [])
        };
        let positive = slope(self);
        let negative = slope(self);
        let sign = self.plain(x.n, 1.0);
        let scaled = self.multiply(x, positive);
        let squared = self.multiply(scaled, x);
        self.drop(scaled);
        let linear = self.scale(x);
        let above = self.add(squared, linear);
        self.drop(squared);
        self.drop(linear);
        let least = self.result(x.n, x.width, Rule::Least(x.bytes()), [x.node, NONE, NONE], [x]);
        let exponential = self.unary(least, Saved::Output);
        self.drop(least);
        let apart = self.result(
            x.n,
            x.width,
            Rule::Difference { full: x.bytes(), sum: 0.0 },
            [exponential.node, x.node, NONE],
            [],
        );
        self.drop(exponential);
        let product = self.multiply(apart, negative);
        self.drop(apart);
        let linear = self.scale(x);
        let below = self.add(product, linear);
        self.drop(product);
        self.drop(linear);
        let rule = Rule::Where(x.bytes());
        let out = self.result(x.n, x.width, rule, [above.node, below.node, NONE], [sign]);
        for tensor in [above, below, sign, positive, negative] {
            self.drop(tensor);
        }
        out
    }

    /// `1 / sqrt(x)`.
    pub(crate) fn rsqrt(&mut self, x: Tensor) -> Tensor {
        let mut out = self.plain(x.n, x.width);
        out = self.link(out, Rule::Power(x.bytes()), [x.node, NONE, NONE], [out]);
        out
    }

    /// Dropout: a mask of one byte an element, kept if `x` needs a gradient.
    pub(crate) fn dropout(&mut self, x: Tensor) -> Tensor {
        let mut out = self.plain(x.n, x.width);
        let mask = self.plain(x.n, 1.0);
        out = self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], [mask]);
        self.drop(mask);
        out
    }

    /// A convolution of each channel by itself, to `n` elements, with `bias` numbers added (0: none): keeps its input.
    pub(crate) fn convolution(&mut self, x: Tensor, n: f64, weight: Parameter, bias: f64) -> Tensor {
        let leaf = self.leaf(weight.trains);
        let bytes = |n: f64| if weight.trains { n * weight.width } else { 0.0 };
        let input = if x.needs_gradient() { x.bytes() } else { 0.0 };
        let rule = Rule::LayerNorm { input, weight: bytes(weight.n), bias: bytes(bias) };
        self.result(n, x.width, rule, [x.node, leaf, leaf], [x])
    }

    /// `x @ weight`, the weight a parameter or a copy of one.
    pub(crate) fn matrix(&mut self, x: Tensor, rows: f64, weight: Weight) -> Tensor {
        let Weight { input, output, width, trains, copy, bias, times } = weight;
        let weight_node = match copy {
            Some(copy) => copy.node,
            None => self.leaf(trains),
        };
        let out = self.plain(rows * output, x.width.min(width));
        let in_bytes = if x.needs_gradient() { rows * input * x.width } else { 0.0 };
        let weight_bytes = if weight_node == NONE { 0.0 } else { times * input * output * width };
        let rule = if bias {
            let bias = if weight_bytes > 0.0 { times * output * width } else { 0.0 };
            Rule::Affine { weight: weight_bytes, input: in_bytes, bias }
        } else {
            Rule::Matrix { weight: weight_bytes, input: in_bytes }
        };
        let inputs = [weight_node, x.node, NONE];
        let kept_input = (weight_node != NONE).then_some(x);
        let kept_weight = copy.filter(|_| x.needs_gradient());
        self.link(out, rule, inputs, kept_input.into_iter().chain(kept_weight))
    }

    /// `x @ unpack(weight)` with a frozen 4-bit weight; peft clones the result.
    pub(crate) fn four_bit(&mut self, x: Tensor, rows: f64, input: f64, output: f64, width: f64) -> Tensor {
        let scales = 4.0 * (input * output / 64.0).ceil();
        let unpacked = width * input * output;
        let temporary = self.plain(scales, 1.0);
        let weight = self.plain(unpacked, 1.0);
        self.drop(temporary);
        let mut out = self.plain(rows * output, width);
        self.drop(weight);
        let rule = Rule::FourBit { scales, weight: unpacked, input: rows * input * width };
        out = self.link(out, rule, [x.node, NONE, NONE], []);
        let clone = self.result(out.n, out.width, Rule::Pass, [out.node, NONE, NONE], []);
        self.drop(out);
        clone
    }

    /// The point to which the gradients of a rotated part and of the rest come back; call it for q and k before
    /// [`Tape::rotate`], because the parts are cut before either is rotated.
    pub(crate) fn cut(&mut self, x: Tensor, rotation: Rotation) -> Tensor {
        let part = match rotation {
            Rotation::Whole | Rotation::Halves | Rotation::Lifted(_) => return x,
            Rotation::WholeJoined => 1.0,
            Rotation::Partial(part) => part,
        };
        let mut cut = Tensor { node: NONE, ..x };
        let rule = Rule::Rejoin { all: x.bytes(), part: x.bytes() * part };
        cut = self.link(cut, rule, [x.node, NONE, NONE], []);
        cut
    }

    /// `x * cos + rotate_half(x) * sin`; a part that is not rotated is joined to it.
    pub(crate) fn rotate(&mut self, x: Tensor, rotation: Rotation, tables: [Tensor; 2]) -> Tensor {
        let width = x.width.max(tables[0].width);
        let n = match rotation {
            Rotation::Halves => return self.rotate_halves(x, width, tables),
            Rotation::Whole | Rotation::WholeJoined | Rotation::Lifted(_) => x.n,
            Rotation::Partial(part) => x.n * part,
        };
        let straight = self.plain(n, width);
        let half = self.plain(n / 2.0, x.width);
        let turned = self.plain(n, x.width);
        self.drop(half);
        let crossed = self.plain(n, width);
        self.drop(turned);
        let mut out = self.plain(n, width);
        self.drop(straight);
        self.drop(crossed);
        let joined = matches!(rotation, Rotation::WholeJoined | Rotation::Partial(_));
        if joined {
            let all = self.plain(x.n, width);
            self.drop(out);
            out = all;
        }
        let rule = Rule::Rotate { n: n * width, joined };
        out = self.link(out, rule, [x.node, NONE, NONE], [tables[0], tables[1]]);
        out
    }

    fn rotate_halves(&mut self, x: Tensor, width: f64, tables: [Tensor; 2]) -> Tensor {
        let half = x.n / 2.0;
        let mut halves = [x; 2];
        for out in &mut halves {
            let a = self.plain(half, width);
            let b = self.plain(half, width);
            *out = self.plain(half, width);
            self.drop(a);
            self.drop(b);
        }
        let mut out = self.plain(x.n, width);
        self.drop(halves[0]);
        self.drop(halves[1]);
        out = self.link(out, Rule::RotateHalves(half * width), [x.node, NONE, NONE], [tables[0], tables[1]]);
        out
    }

    /// A fused attention kernel on q, k, v: its result and the log-sum-exp of `sums` bytes.
    pub(crate) fn attention(&mut self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor {
        let mut repeated = [k, v];
        if kernel.repeats {
            for tensor in &mut repeated {
                *tensor = self.plain(q.n, tensor.width);
            }
        } else {
            self.hold(k);
            self.hold(v);
        }
        let bias = (kernel.bias > 0.0).then(|| self.plain(kernel.bias, 1.0));
        let mut out = self.plain(kernel.made.unwrap_or(q.n), v.width);
        let sums = self.plain(kernel.sums, 1.0);
        let unrepeated = if kernel.spreads { k.bytes() } else { 0.0 };
        let each = |x: Tensor| if kernel.spreads { q.n * x.width } else { x.bytes() };
        let rule = Rule::Attention {
            gradients: [q.bytes(), each(k), each(v)],
            workspace: kernel.workspace,
            unrepeated,
        };
        let inputs = [q.node, k.node, v.node];
        let saved = [q, repeated[0], repeated[1], out, sums].into_iter().chain(bias);
        out = self.link(out, rule, inputs, saved);
        self.drop(sums);
        self.drop(repeated[0]);
        self.drop(repeated[1]);
        if let Some(bias) = bias {
            self.drop(bias);
        }
        out
    }

    /// Attention by plain products: every score is kept.
    ///
    /// `rows` is rows x heads x length, `scores` that times the length; `sinks` adds one column.
    pub(crate) fn eager(&mut self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor {
        let Scores { elements, rows, masked, sinks, capped, lifts, contiguous_query, .. } = scores;
        let width = q.width;
        // K and V are repeated to all heads, or made contiguous for the products: a copy in either case.
        let copied_key = if scores.contiguous_key { self.hold(k) } else { self.plain(q.n, k.width) };
        let copied_value =
            if scores.contiguous_value { self.hold(v) } else { self.plain(scores.values, v.width) };
        let repeated = [copied_key, copied_value];
        let query = if contiguous_query { self.hold(q) } else { self.plain(q.n, width) };
        let products = self.plain(elements, width);
        let scaled = self.plain(elements, width);
        self.drop(products);
        let mut logits = scaled;
        let mut tanh = None;
        if capped {
            let divided = self.plain(elements, width);
            self.drop(logits);
            let squeezed = self.plain(elements, width);
            self.drop(divided);
            logits = self.plain(elements, width);
            tanh = Some(squeezed);
        }
        if masked {
            let added = self.plain(elements, width);
            self.drop(logits);
            logits = added;
        }
        let mut saved_probabilities = None;
        let mut extra = None;
        let probabilities;
        if sinks {
            let joined = self.plain(elements + rows, width);
            let maxima = self.plain(rows, width);
            let places = self.plain(rows, 8.0);
            let shifted = self.plain(elements + rows, width);
            self.drop(maxima);
            self.drop(joined);
            probabilities = self.plain(elements + rows, width);
            extra = Some((places, shifted));
            self.drop(logits);
        } else if lifts && width < 4.0 {
            let wide = self.plain(elements, 4.0);
            let softmax = self.plain(elements, 4.0);
            self.drop(wide);
            probabilities = self.plain(elements, width);
            saved_probabilities = Some(softmax);
            self.drop(logits);
        } else {
            probabilities = self.plain(elements, width);
            self.drop(logits);
        }
        let product = self.plain(scores.values, width);
        let mut out = self.plain(scores.values, width);
        self.drop(product);
        let rule = Rule::Eager {
            value: scores.values * width,
            scores: elements * width,
            wide: if saved_probabilities.is_some() { elements * 4.0 } else { 0.0 },
            query: q.bytes(),
            key: if k.n < q.n { k.bytes() } else { 0.0 },
            sinks: if sinks { (elements + rows) * width } else { 0.0 },
            sums: rows * width,
            capped,
        };
        let inputs = [q.node, k.node, v.node];
        // The query is kept for the gradient of the key, which a frozen first layer does not have.
        let for_key = if k.needs_gradient() { self.hold(query) } else { self.plain(0.0, width) };
        // And the probabilities for that of the value.
        let lies = saved_probabilities.is_some() && !v.needs_gradient();
        let for_value = if lies { self.plain(0.0, width) } else { self.hold(probabilities) };
        let kept = [for_key, repeated[0], repeated[1], for_value].into_iter().chain(saved_probabilities);
        let kept = kept.chain(extra.map(|(places, _)| places)).chain(tanh);
        out = self.link(out, rule, inputs, kept);
        for tensor in [for_key, for_value, query, repeated[0], repeated[1], probabilities]
            .into_iter()
            .chain(saved_probabilities)
            .chain(tanh)
        {
            self.drop(tensor);
        }
        if let Some((places, shifted)) = extra {
            self.drop(places);
            self.drop(shifted);
        }
        out
    }

    /// `x[index]`: `n` elements of it.
    pub(crate) fn index(&mut self, x: Tensor, n: f64, index: Tensor) -> Tensor {
        self.result(n, x.width, Rule::Scatter(x.bytes()), [x.node, NONE, NONE], [index])
    }

    /// `x[:, -k:]`: a view whose gradient is as large as all of `x`.
    pub(crate) fn slice(&mut self, x: Tensor, n: f64) -> Tensor {
        let mut out = self.hold(x).view(n);
        out.node = NONE;
        out = self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], []);
        out
    }

    /// Two halves of `x`, views of it, as one handle each; their gradients are joined.
    pub(crate) fn halves(&mut self, x: Tensor) -> [Tensor; 2] {
        let mut first = self.hold(x).view(x.n / 2.0);
        let mut second = self.hold(x).view(x.n / 2.0);
        let mut node = Tensor { node: NONE, ..x };
        node = self.link(node, Rule::Join(x.bytes()), [x.node, NONE, NONE], []);
        first.node = node.node;
        second.node = node.node;
        [first, second]
    }

    /// Three equal parts of `x`, views of it, as one handle each; their gradients are joined (`chunk`).
    pub(crate) fn thirds(&mut self, x: Tensor) -> [Tensor; 3] {
        let mut node = Tensor { node: NONE, ..x };
        node = self.link(node, Rule::Join(x.bytes()), [x.node, NONE, NONE], []);
        [0; 3].map(|_| Tensor { node: node.node, ..self.hold(x).view(x.n / 3.0) })
    }

    /// Parts of `x`, views of it, as one handle each; their gradients are joined (`split`).
    pub(crate) fn split<const N: usize>(&mut self, x: Tensor, sizes: [f64; N]) -> [Tensor; N] {
        let mut node = Tensor { node: NONE, ..x };
        node = self.link(node, Rule::Join(x.bytes()), [x.node, NONE, NONE], []);
        sizes.map(|n| Tensor { node: node.node, ..self.hold(x).view(n) })
    }

    /// Three parts of one product as views; each gradient is as large as all of it, and they are summed.
    pub(crate) fn parts(&mut self, x: Tensor, sizes: [f64; 3]) -> [Tensor; 3] {
        sizes.map(|n| {
            let mut part = self.hold(x).view(n);
            part.node = NONE;
            part = self.link(part, Rule::New(x.bytes()), [x.node, NONE, NONE], []);
            part
        })
    }

    /// Experts' weights on sorted rows; `weight` elements in all.
    pub(crate) fn grouped(
        &mut self,
        x: Tensor,
        n: f64,
        parameter: Parameter,
        offsets: Option<Tensor>,
    ) -> Tensor {
        let leaf = self.leaf(parameter.trains);
        let weight = if parameter.trains { parameter.n * parameter.width } else { 0.0 };
        let rule = Rule::Grouped { weight, input: x.bytes() };
        let inputs = [leaf, x.node, NONE];
        let out = self.plain(n, x.width);
        self.link(out, rule, inputs, parameter.trains.then_some(x).into_iter().chain(offsets))
    }

    /// The largest `k` of the scores in each row: values, and places of 8 bytes.
    pub(crate) fn top(&mut self, scores: Tensor, n: f64) -> [Tensor; 2] {
        let mut values = self.plain(n, scores.width);
        let places = self.plain(n, 8.0);
        values = self.link(values, Rule::Scatter(scores.bytes()), [scores.node, NONE, NONE], [places]);
        [values, places]
    }

    /// `sparsemixer`: two experts of each row, one after the other, from scores of which `rows` are chosen each time; weights
    /// and places.
    ///
    /// Source: `modeling_phimoe.py` of transformers 5.19 (`sparsemixer`, `PhimoeMultiplier`).
    pub(crate) fn mixed(&mut self, scores: Tensor, rows: f64) -> [Tensor; 2] {
        let (n, width) = (scores.n, scores.width);
        let mut old: Vec<Tensor> = Vec::new();
        let mut made = [scores; 2];
        let mut held: Vec<Tensor> = Vec::new();
        for (index, out) in made.iter_mut().enumerate() {
            // The first expert's scores are masked out for the second.
            let masked = (index > 0).then(|| self.plain(n, width));
            let (largest, place) = (self.plain(rows, width), self.plain(rows, 8.0));
            let absolute = self.plain(n, width);
            let factor = self.plain(n, width);
            self.drop(absolute);
            if index > 0 {
                self.drop(old.remove(0));
            }
            let difference = self.plain(n, width);
            let share = self.plain(n, width);
            self.drop(difference);
            let mask = self.plain(n, 1.0);
            self.drop(share);
            self.drop(largest);
            let gates = self.plain(n, width);
            let noise = self.plain(n, width);
            let logarithm = self.plain(n, width);
            self.drop(noise);
            let noisy = self.plain(n, width);
            self.drop(logarithm);
            let (value, chosen) = (self.plain(rows, width), self.plain(rows, 8.0));
            self.drop(noisy);
            self.drop(value);
            let softmax = self.plain(n, width);
            self.drop(gates);
            let weight = self.plain(rows, width);
            let best = [self.plain(rows, width), self.plain(rows, 8.0)];
            self.drop(place);
            for tensor in old.drain(..) {
                self.drop(tensor);
            }
            let bits = [self.plain(rows, 1.0), self.plain(rows, 1.0)];
            let either = self.plain(rows, 1.0);
            for tensor in bits {
                self.drop(tensor);
            }
            let wide = self.plain(rows, 4.0);
            let narrow = self.plain(rows, width);
            self.drop(wide);
            self.drop(either);
            let product = self.plain(rows, width);
            let rule = Rule::Mixer { scores: scores.bytes(), chosen: rows * width };
            *out = self.link(product, rule, [scores.node, NONE, NONE], [mask, softmax, chosen, weight]);
            for tensor in [mask, softmax, weight] {
                self.drop(tensor);
            }
            old.extend([factor, best[0], best[1]]);
            held.extend([chosen, narrow]);
            held.extend(masked);
        }
        let weights = self.result(2.0 * rows, width, Rule::Pass, [made[0].node, made[1].node, NONE], []);
        self.drop(made[0]);
        let places = self.plain(2.0 * rows, 8.0);
        for tensor in old.into_iter().chain(held) {
            self.drop(tensor);
        }
        self.drop(made[1]);
        [weights, places]
    }

    /// `values /= values.sum()`, in place.
    pub(crate) fn normalised(&mut self, values: Tensor, rows: f64) -> Tensor {
        let sum = self.plain(rows, values.width);
        let mut out = values;
        if self.recording && values.needs_gradient() {
            let copy = self.plain(values.n, values.width);
            let rule = Rule::Normalise { n: values.bytes(), sum: rows * values.width };
            out.node = NONE;
            out = self.link(out, rule, [values.node, NONE, NONE], [sum, copy]);
            self.drop(copy);
        }
        self.drop(sum);
        out
    }

    /// The clamped gate of gpt-oss on a fused product: `(up + 1) * gate * sigmoid(1.702 * gate)`.
    pub(crate) fn clamped_gate(&mut self, fused: Tensor) -> Tensor {
        let n = fused.n / 2.0;
        let width = fused.width;
        let gate = self.plain(n, width);
        let up = self.plain(n, width);
        let scaled = self.plain(n, width);
        let sigmoid = self.plain(n, width);
        self.drop(scaled);
        let glu = self.plain(n, width);
        let raised = self.plain(n, width);
        let mut out = self.plain(n, width);
        out = self.link(
            out,
            Rule::ClampedGate(n * width),
            [fused.node, NONE, NONE],
            [fused, gate, sigmoid, glu, raised],
        );
        for tensor in [raised, gate, up, glu] {
            self.drop(tensor);
        }
        self.drop(sigmoid);
        out
    }
}

/// What an operation with one input keeps for its backward formula.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Saved {
    /// Nothing.
    Nothing,
    /// Its input (silu, gelu).
    Input,
    /// Its result (tanh, sigmoid, softmax).
    Output,
}

/// A parameter: elements, bytes of one, and whether it trains.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Parameter {
    /// Elements.
    pub n: f64,
    /// Bytes of an element.
    pub width: f64,
    /// It gets a gradient.
    pub trains: bool,
}

/// The weight of a matrix product.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Weight {
    /// Inputs.
    pub input: f64,
    /// Outputs.
    pub output: f64,
    /// Bytes of an element as the product sees it.
    pub width: f64,
    /// It gets a gradient.
    pub trains: bool,
    /// Autocast's copy, when the product sees one.
    pub copy: Option<Tensor>,
    /// A bias is added.
    pub bias: bool,
    /// Weights of this size that share the rows: experts of a mixture; else 1.
    pub times: f64,
}

/// How positions are written into q and k.
#[derive(Copy, Clone, Debug, PartialEq)]
pub(crate) enum Rotation {
    /// All of a head, by halves.
    Whole,
    /// The same, joined to a rest that is empty (Phi-3).
    WholeJoined,
    /// This share of a head (GLM).
    Partial(f64),
    /// Both halves apart (gpt-oss).
    Halves,
    /// In fp32, see [`Tape::rotate_lifted`].
    Lifted(Rotary),
}

/// What a fused attention kernel takes beside q, k, v and its result.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Kernel {
    /// Log-sum-exp, bytes.
    pub sums: f64,
    /// Mask in the type of q, bytes; 0 without.
    pub bias: f64,
    /// K and V are copied out to all heads.
    pub repeats: bool,
    /// K and V are spread to all heads by a copy or a view, and their gradients summed.
    pub spreads: bool,
    /// What it makes, elements, where that is not as much as q (heads of two widths).
    pub made: Option<f64>,
    /// Buffers of the backward pass, bytes.
    pub workspace: [f64; 5],
}

/// Scores of eager attention.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Scores {
    /// Scores: rows x heads x length x length.
    pub elements: f64,
    /// Rows x heads x length.
    pub rows: f64,
    /// A mask is added.
    pub masked: bool,
    /// A learned sink is joined to each row.
    pub sinks: bool,
    /// Scores are squeezed through tanh (Gemma 2).
    pub capped: bool,
    /// The softmax is computed in fp32.
    pub lifts: bool,
    /// q needs no copy for the product.
    pub contiguous_query: bool,
    /// k needs none.
    pub contiguous_key: bool,
    /// v needs none.
    pub contiguous_value: bool,
    /// Values of all heads, elements.
    pub values: f64,
}
