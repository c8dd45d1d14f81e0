//! Values from the text of `/metrics`.

/// Sum of the series that `series` names: `name`, or `name{` and the beginning of its labels.
///
/// Panics if there is no such series, because an assertion that a misspelt one is 0 would always hold.
#[track_caller]
pub fn sum(text: &str, series: &str) -> f64 {
    let mut figures = text.lines().filter_map(|line| figure(line, series)).peekable();
    assert!(figures.peek().is_some(), "there is no series {series}");
    figures.sum()
}

fn figure(line: &str, series: &str) -> Option<f64> {
    let rest = line.strip_prefix(series.trim_end())?;
    let is_longer_name = !series.contains('{') && !rest.starts_with(['{', ' ']);
    if is_longer_name {
        return None;
    }
    rest.rsplit(' ').next()?.parse().ok()
}
