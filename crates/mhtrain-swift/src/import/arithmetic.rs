//! What do `$((16 / N))` and `$(expr 16 / $N)` come to?
//!
//! Launch scripts compute the accumulation from the number of cards so. Whole numbers, `+ - * / %` and brackets are
//! all that they use.

/// Returns the value of an expression; `value_of` gives the number that a variable holds.
///
/// `None`: it is no such expression, divides by zero, or leaves the range of 64 bits.
pub(super) fn evaluate(text: &str, value_of: impl Fn(&str) -> Option<i64>) -> Option<i64> {
    let mut reader = Reader { rest: text, value_of, depth: 0 };
    let value = reader.sum()?;
    reader.rest.trim().is_empty().then_some(value)
}

/// More brackets than this no script has.
const DEPTH_MAX: u32 = 32;

struct Reader<'a, F> {
    rest: &'a str,
    value_of: F,
    depth: u32,
}

impl<F: Fn(&str) -> Option<i64>> Reader<'_, F> {
    /// Takes one of these signs if it comes next. `expr` needs its star escaped.
    fn sign(&mut self, signs: &[char]) -> Option<char> {
        let rest = self.rest.trim_start();
        let rest = if rest.starts_with("\\*") { &rest[1..] } else { rest };
        let sign = rest.chars().next().filter(|sign| signs.contains(sign))?;
        self.rest = &rest[sign.len_utf8()..];
        Some(sign)
    }

    fn sum(&mut self) -> Option<i64> {
        let mut value = self.product()?;
        while let Some(sign) = self.sign(&['+', '-']) {
            let next = self.product()?;
            value = if sign == '+' { value.checked_add(next)? } else { value.checked_sub(next)? };
        }
        Some(value)
    }

    fn product(&mut self) -> Option<i64> {
        let mut value = self.operand()?;
        while let Some(sign) = self.sign(&['*', '/', '%']) {
            let next = self.operand()?;
            value = match sign {
                '*' => value.checked_mul(next)?,
                '/' => value.checked_div(next)?,
                _ => value.checked_rem(next)?,
            };
        }
        Some(value)
    }

    fn operand(&mut self) -> Option<i64> {
        if self.sign(&['-']).is_some() {
            return self.nested(Reader::operand)?.checked_neg();
        }
        if self.sign(&['(']).is_some() {
            let value = self.nested(Reader::sum)?;
            self.sign(&[')'])?;
            return Some(value);
        }
        let rest = self.rest.trim_start();
        let rest = rest.strip_prefix('$').unwrap_or(rest);
        let rest = rest.strip_prefix('{').unwrap_or(rest);
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (word, rest) = rest.split_at(end);
        self.rest = rest.strip_prefix('}').unwrap_or(rest);
        if word.starts_with(|c: char| c.is_ascii_digit()) { word.parse().ok() } else { (self.value_of)(word) }
    }

    fn nested(&mut self, read: impl FnOnce(&mut Self) -> Option<i64>) -> Option<i64> {
        self.depth += 1;
        let value = if self.depth <= DEPTH_MAX { read(self) } else { None };
        self.depth -= 1;
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_launch_scripts_compute() {
        let value_of = |name: &str| (name == "N").then_some(2);
        for (text, value) in [
            ("16 / 2", Some(8)),
            ("16/$N", Some(8)),
            (" 16 / ${N} ", Some(8)),
            ("N * (3 + 4) - 1", Some(13)),
            ("16 \\* N", Some(32)),
            ("-3 + 10 % 4", Some(-1)),
            ("", None),
            ("16 / 0", None),
            ("16 / $M", None),
            ("16 / 2 )", None),
            ("(16", None),
            ("1.5 * 2", None),
            ("9223372036854775807 + 1", None),
        ] {
            assert_eq!(evaluate(text, value_of), value, "{text}");
        }
        assert_eq!(evaluate(&"(".repeat(100_000), value_of), None);
        assert_eq!(evaluate(&"-".repeat(100_000), value_of), None);
    }
}
