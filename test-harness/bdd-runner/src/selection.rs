//! The selection of scenarios for a run.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use cucumber::gherkin::tagexpr::TagOperation;
use cucumber::gherkin::{Feature, Rule, Scenario};
use cucumber::tag::Ext as _;
use regex::Regex;

/// The tag of long scenarios. They run only if the requested tags name it.
const SOAK: &str = "soak";

/// The selection on the command line.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// A pattern that names must match.
    pub name: Option<Regex>,
    /// An expression that tags must satisfy.
    pub tags: Option<TagOperation>,
}

impl Selection {
    /// Returns whether a scenario is selected.
    pub fn takes(&self, feature: &Feature, rule: Option<&Rule>, scenario: &Scenario) -> bool {
        let tags: Vec<_> = tags_of(feature, rule, scenario).collect();
        let named = self.name.as_ref();
        let wanted = self.tags.as_ref();
        named.is_none_or(|name| name.is_match(&scenario.name))
            && wanted.is_none_or(|wanted| wanted.eval(tags.iter()))
            && (!tags.iter().any(|tag| *tag == SOAK) || self.mentions(SOAK))
    }

    fn mentions(&self, tag: &str) -> bool {
        self.mentioned().contains(tag)
    }

    fn mentioned(&self) -> BTreeSet<&str> {
        fn collect<'a>(operation: &'a TagOperation, found: &mut BTreeSet<&'a str>) {
            match operation {
                TagOperation::And(left, right) | TagOperation::Or(left, right) => {
                    collect(left, found);
                    collect(right, found);
                }
                TagOperation::Not(inner) => collect(inner, found),
                TagOperation::Tag(tag) => {
                    found.insert(tag);
                }
            }
        }
        let mut found = BTreeSet::new();
        if let Some(tags) = &self.tags {
            collect(tags, &mut found);
        }
        found
    }

    /// Returns the lines of the selected scenarios, as `Feature: scenario`; fails if none is selected.
    pub fn of(&self, features: &[Feature]) -> Result<Vec<String>, String> {
        let (mut lines, mut known) = (Vec::new(), BTreeSet::new());
        for feature in features {
            let plain = feature.scenarios.iter().map(|scenario| (None, scenario));
            let ruled = feature.rules.iter().flat_map(|rule| {
                let scenarios = rule.scenarios.iter();
                scenarios.map(move |scenario| (Some(rule), scenario))
            });
            for (rule, scenario) in plain.chain(ruled) {
                known.extend(tags_of(feature, rule, scenario).map(String::as_str));
                if self.takes(feature, rule, scenario) {
                    lines.push(format!("{}: {}", feature.name, scenario.name));
                }
            }
        }
        if let Some(unknown) = self
            .mentioned()
            .into_iter()
            .find(|tag| !known.contains(tag))
        {
            let known: Vec<_> = known.into_iter().map(|tag| format!("@{tag}")).collect();
            return Err(format!(
                "no scenario has the tag `@{unknown}`; the tags are {}",
                known.join(", ")
            ));
        }
        if lines.is_empty() {
            return Err(self.nothing());
        }
        Ok(lines)
    }

    fn nothing(&self) -> String {
        let mut text = "no scenario is selected".to_owned();
        if let Some(name) = &self.name {
            let _ = write!(text, " by the name `{name}`");
        }
        if self.tags.is_some() {
            text.push_str(" by these tags");
        } else {
            text.push_str("; those tagged @soak run only with `--tags @soak`");
        }
        text
    }
}

fn tags_of<'a>(
    feature: &'a Feature,
    rule: Option<&'a Rule>,
    scenario: &'a Scenario,
) -> impl Iterator<Item = &'a String> {
    let of_rule = rule.into_iter().flat_map(|rule| &rule.tags);
    feature.tags.iter().chain(of_rule).chain(&scenario.tags)
}
