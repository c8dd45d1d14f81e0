//! Counters, gauges and histograms on one recorder, families of them by a closed label, and the table of all metrics.
//! [`crate::metrics`] defines the metrics.

use std::{cell::RefCell, time::Duration};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::PrometheusRecorder;

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// One metric, as docs/METRICS.md shows it.
pub struct Definition {
    pub name: &'static str,
    pub kind: &'static str,
    pub help: &'static str,
    pub labels: Vec<(&'static str, Vec<&'static str>)>,
}

/// The rows of docs/METRICS.md, by name.
pub fn table<'a>(definitions: impl Iterator<Item = &'a Definition>) -> String {
    let mut rows: Vec<&Definition> = definitions.collect();
    rows.sort_by_key(|row| row.name);
    let mut text = String::new();
    for row in rows {
        let labels: Vec<String> = row
            .labels
            .iter()
            .map(|(label, values)| match values.as_slice() {
                [] => format!("`{label}`"),
                values => format!("`{label}`: {}", values.join(", ")),
            })
            .collect();
        text.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            row.name,
            row.kind,
            row.help,
            labels.join("; ")
        ));
    }
    text
}

/// One counter for each value of a closed label.
pub struct Family(Box<[(&'static str, Counter)]>);

impl Family {
    /// Counts one. A value outside the closed set is a bug of the caller, and is ignored.
    pub fn increment(&self, value: &'static str) {
        self.add(value, 1);
    }

    /// Sets the counter to a count that is kept elsewhere and never falls.
    pub fn absolute(&self, value: &'static str, count: u64) {
        if let Some(counter) = self.counter(value) {
            counter.absolute(count);
        }
    }

    /// Counts `n` at once.
    pub fn add(&self, value: &'static str, n: u64) {
        if let Some(counter) = self.counter(value) {
            counter.increment(n);
        }
    }

    fn counter(&self, value: &'static str) -> Option<&Counter> {
        let found = self.0.iter().find(|(label, _)| *label == value);
        debug_assert!(found.is_some(), "{value} is not in the closed set");
        found.map(|(_, counter)| counter)
    }
}

/// One gauge for each value of a closed label.
pub struct GaugeFamily(Box<[(&'static str, Gauge)]>);

impl GaugeFamily {
    pub fn set(&self, value: &'static str, figure: f64) {
        let found = self.0.iter().find(|(label, _)| *label == value);
        debug_assert!(found.is_some(), "{value} is not in the closed set");
        if let Some((_, gauge)) = found {
            gauge.set(figure);
        }
    }
}

/// One histogram for each combination of values of `N` closed labels.
pub struct HistogramFamily<const N: usize>(Box<[([&'static str; N], Histogram)]>);

impl<const N: usize> HistogramFamily<N> {
    /// Records a duration. A combination outside the closed sets is a bug of the caller, and is ignored.
    pub fn record(&self, values: [&'static str; N], duration: Duration) {
        let found = self.0.iter().find(|(labels, _)| *labels == values);
        debug_assert!(found.is_some(), "{values:?} is not in the closed sets");
        if let Some((_, histogram)) = found {
            histogram.record(duration);
        }
    }
}

/// Creates series, and records their definitions.
pub struct Names<'a> {
    recorder: &'a PrometheusRecorder,
    catalog: RefCell<Vec<Definition>>,
}

impl<'a> Names<'a> {
    pub fn of(recorder: &'a PrometheusRecorder) -> Self {
        Self {
            recorder,
            catalog: RefCell::default(),
        }
    }

    /// Definitions of all metrics created so far.
    pub fn into_catalog(self) -> Vec<Definition> {
        self.catalog.into_inner()
    }

    fn define(
        &self,
        name: &'static str,
        kind: &'static str,
        help: &'static str,
        labels: &[(&'static str, &[&'static str])],
    ) {
        let labels = labels.iter().map(|(label, values)| (*label, values.to_vec())).collect();
        let mut catalog = self.catalog.borrow_mut();
        match catalog.iter_mut().find(|row| row.name == name) {
            Some(row) => merge(&mut row.labels, labels),
            None => catalog.push(Definition {
                name,
                kind,
                help,
                labels,
            }),
        }
    }

    pub fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        self.define(name, "counter", help, &[]);
        self.recorder
            .describe_counter(KeyName::from_const_str(name), None, SharedString::const_str(help));
        let counter = self.recorder.register_counter(&Key::from_static_name(name), &METADATA);
        counter.absolute(0);
        counter
    }

    pub fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        self.define(name, "gauge", help, &[]);
        self.recorder
            .describe_gauge(KeyName::from_const_str(name), None, SharedString::const_str(help));
        let gauge = self.recorder.register_gauge(&Key::from_static_name(name), &METADATA);
        gauge.set(0.0);
        gauge
    }

    pub fn histogram(&self, name: &'static str, help: &'static str) -> Histogram {
        self.define(name, "histogram", help, &[]);
        self.recorder.describe_histogram(
            KeyName::from_const_str(name),
            Some(Unit::Seconds),
            SharedString::const_str(help),
        );
        self.recorder
            .register_histogram(&Key::from_static_name(name), &METADATA)
    }

    pub fn histograms<const N: usize>(
        &self,
        name: &'static str,
        help: &'static str,
        labels: [(&'static str, &[&'static str]); N],
    ) -> HistogramFamily<N> {
        self.define(name, "histogram", help, &labels);
        self.recorder.describe_histogram(
            KeyName::from_const_str(name),
            Some(Unit::Seconds),
            SharedString::const_str(help),
        );
        let mut combinations = vec![[""; N]];
        for (index, (_, values)) in labels.iter().enumerate() {
            let with = |combination: [&'static str; N], value: &&'static str| {
                let mut combination = combination;
                combination[index] = *value;
                combination
            };
            let extended = combinations
                .iter()
                .flat_map(|combination| values.iter().map(move |value| with(*combination, value)));
            combinations = extended.collect();
        }
        let handles = combinations.into_iter().map(|combination| {
            let pairs = labels.iter().zip(combination);
            let key_labels: Vec<Label> = pairs.map(|((label, _), value)| Label::new(*label, value)).collect();
            let key = Key::from_parts(name, key_labels);
            (combination, self.recorder.register_histogram(&key, &METADATA))
        });
        HistogramFamily(handles.collect())
    }

    pub fn family(
        &self,
        name: &'static str,
        help: &'static str,
        fixed: &[(&'static str, &'static str)],
        label: &'static str,
        values: &[&'static str],
    ) -> Family {
        let mut labels: Vec<(&'static str, &[&'static str])> = fixed
            .iter()
            .map(|(label, value)| (*label, std::slice::from_ref(value)))
            .collect();
        labels.push((label, values));
        self.define(name, "counter", help, &labels);
        self.recorder
            .describe_counter(KeyName::from_const_str(name), None, SharedString::const_str(help));
        let handles = values.iter().map(|value| {
            let mut labels: Vec<Label> = fixed.iter().map(|(name, value)| Label::new(*name, *value)).collect();
            labels.push(Label::new(label, *value));
            let counter = self
                .recorder
                .register_counter(&Key::from_parts(name, labels), &METADATA);
            counter.absolute(0);
            (*value, counter)
        });
        Family(handles.collect())
    }

    pub fn gauges(
        &self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: &[&'static str],
    ) -> GaugeFamily {
        self.define(name, "gauge", help, &[(label, values)]);
        self.recorder
            .describe_gauge(KeyName::from_const_str(name), None, SharedString::const_str(help));
        let handles = values.iter().map(|value| {
            let key = Key::from_parts(name, vec![Label::new(label, *value)]);
            let gauge = self.recorder.register_gauge(&key, &METADATA);
            gauge.set(0.0);
            (*value, gauge)
        });
        GaugeFamily(handles.collect())
    }
}

/// Two families of one name differ in a fixed label. Its values are those of both.
fn merge(labels: &mut [(&'static str, Vec<&'static str>)], more: Vec<(&'static str, Vec<&'static str>)>) {
    for (label, values) in more {
        if let Some((_, known)) = labels.iter_mut().find(|(name, _)| *name == label) {
            known.extend(
                values
                    .into_iter()
                    .filter(|value| !known.contains(value))
                    .collect::<Vec<_>>(),
            );
        }
    }
}
