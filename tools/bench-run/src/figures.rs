//! Figures of a set: mean, middle, percentiles, spread. Pure.

/// 0 of nothing.
pub fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len().max(1) as f64
}

/// The median; 0 of nothing.
pub fn middle(figures: &[f64]) -> f64 {
    at(figures, 50)
}

/// Nearest rank; 0 of nothing.
pub fn at(figures: &[f64], percent: usize) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(place).copied().unwrap_or_default()
}

/// From the least to the most, in percent of the middle; 0 of nothing.
pub fn spread_percent(figures: &[f64]) -> f64 {
    let middle = middle(figures);
    if middle > 0.0 { (at(figures, 100) - at(figures, 0)) / middle * 100.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_set() {
        let figures = [30.0, 10.0, 20.0];
        assert_eq!([mean(&figures), middle(&figures), at(&figures, 99)], [20.0, 20.0, 30.0]);
        assert_eq!(spread_percent(&figures), 100.0);
        assert_eq!([mean(&[]), middle(&[]), spread_percent(&[])], [0.0; 3]);
    }
}
