//! How does a figure go over a whole run, in a few characters?

/// Characters of a curve.
const WIDTH: usize = 16;

const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A figure over time, drawn as a row of blocks between its lowest and its highest value. However many values come, it is
/// the whole run: when there are too many points, neighbours become their mean.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    points: Vec<f64>,
    /// How many values each point is the mean of.
    stride: usize,
    /// Sum and count of the values of the point that is not full yet.
    open: (f64, usize),
}

impl Default for Curve {
    fn default() -> Curve {
        Curve { points: Vec::new(), stride: 1, open: (0.0, 0) }
    }
}

impl Curve {
    /// Adds a value. What is no number is left out.
    pub fn push(&mut self, value: f64) {
        if !value.is_finite() {
            return;
        }
        self.open = (self.open.0 + value, self.open.1 + 1);
        if self.open.1 < self.stride {
            return;
        }
        self.points.push(mean(self.open));
        self.open = (0.0, 0);
        if self.points.len() == 2 * WIDTH {
            self.points = self.points.chunks(2).map(|two| two.iter().sum::<f64>() / 2.0).collect();
            self.stride *= 2;
        }
    }

    /// Returns the row of blocks; empty while there are fewer than two points.
    pub fn draw(&self) -> String {
        let mut points = self.points.clone();
        if self.open.1 > 0 {
            points.push(mean(self.open));
        }
        if points.len() < 2 {
            return String::new();
        }
        let low = points.iter().copied().fold(f64::INFINITY, f64::min);
        let high = points.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let columns = points.len().min(WIDTH);
        (0..columns)
            .map(|column| {
                let part = &points[column * points.len() / columns..(column + 1) * points.len() / columns];
                block(part.iter().sum::<f64>() / count(part.len()), low, high)
            })
            .collect()
    }
}

fn mean((sum, number): (f64, usize)) -> f64 {
    sum / count(number)
}

#[expect(clippy::cast_precision_loss, reason = "a few thousand at most")]
fn count(number: usize) -> f64 {
    number as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 7")]
fn block(value: f64, low: f64, high: f64) -> char {
    if high <= low {
        return BLOCKS[0];
    }
    let share = ((value - low) / (high - low)).clamp(0.0, 1.0);
    BLOCKS[(share * 7.0).round() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(values: impl IntoIterator<Item = f64>) -> String {
        let mut curve = Curve::default();
        values.into_iter().for_each(|value| curve.push(value));
        curve.draw()
    }

    #[test]
    fn a_falling_loss_falls() {
        assert_eq!(drawn([]), "");
        assert_eq!(drawn([2.0]), "");
        assert_eq!(drawn([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), "█▇▆▅▄▃▂▁");
        assert_eq!(drawn([1.0, 1.0, f64::NAN, 1.0]), "▁▁▁");
    }

    #[test]
    fn a_long_run_is_drawn_whole() {
        for count in [100, 1000, 12_345] {
            let curve = drawn((0..count).map(|n| -f64::from(n)));
            assert_eq!(curve.chars().count(), WIDTH, "{count}");
            assert!(curve.starts_with('█') && curve.ends_with('▁'), "{count}: {curve}");
            let falls = curve.chars().zip(curve.chars().skip(1)).all(|(a, b)| a >= b);
            assert!(falls, "{count}: {curve}");
        }
    }
}
