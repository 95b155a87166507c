//! The images to generate, and their seeds. Pure functions.

use sha2::{Digest, Sha256};

use super::layout::{Catalogue, Subject, with_class, with_placeholder};
use coar_engine::model::ModelError;

/// Which part of the benchmark; `None` is all of it.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Names of subjects.
    pub subjects: Option<Vec<String>>,
    /// Indices of prompts in a subject's list, from 0.
    pub prompts: Option<Vec<usize>>,
}

/// One prompt of one subject with all its images: generated in one batch and claimed by one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Index in the subject's list.
    pub index: usize,
    /// With the placeholder.
    pub prompt: String,
    /// With the class noun only: the text for CLIP-T.
    pub text: String,
}

/// The units of work, in the order of the catalogue.
#[derive(Debug, Clone)]
pub struct Plan {
    pub subjects: Vec<(Subject, Vec<Unit>)>,
    /// Images per unit.
    pub pictures: u32,
}

/// Maximum number of images per prompt: they are generated in one batch.
pub const IMAGES_LIMIT: u32 = 16;

impl Plan {
    /// # Errors
    /// When the choice names a subject or prompt that the catalogue lacks, or selects nothing or too many images.
    pub fn new(catalogue: &Catalogue, choice: &Choice, pictures: u32) -> Result<Self, ModelError> {
        if !(1..=IMAGES_LIMIT).contains(&pictures) {
            let problem = format!("is {pictures}; expected 1 to {IMAGES_LIMIT}");
            return Err(ModelError::invalid("pictures", problem));
        }
        let known: Vec<&str> = catalogue.subjects.iter().map(|subject| subject.name.as_str()).collect();
        let wanted = choice.subjects.as_deref().unwrap_or_default();
        if let Some(unknown) = wanted.iter().find(|name| !known.contains(&name.as_str())) {
            let problem = format!("names `{unknown}`; the subjects are {}", known.join(", "));
            return Err(ModelError::invalid("subjects", problem));
        }
        let chosen = |subject: &&Subject| choice.subjects.is_none() || wanted.contains(&subject.name);
        let subjects = catalogue
            .subjects
            .iter()
            .filter(chosen)
            .map(|subject| Ok((subject.clone(), units(catalogue, subject, choice)?)))
            .collect::<Result<Vec<_>, ModelError>>()?;
        if subjects.iter().all(|(_, units)| units.is_empty()) {
            return Err(ModelError::invalid(
                "subjects",
                "and prompts select nothing to generate",
            ));
        }
        Ok(Self { subjects, pictures })
    }

    /// Total number of images.
    pub fn total(&self) -> u64 {
        let units: usize = self.subjects.iter().map(|(_, units)| units.len()).sum();
        units as u64 * u64::from(self.pictures)
    }
}

fn units(catalogue: &Catalogue, subject: &Subject, choice: &Choice) -> Result<Vec<Unit>, ModelError> {
    let prompts = catalogue.prompts(subject);
    let beyond = |wanted: &Vec<usize>| wanted.iter().copied().find(|&index| index >= prompts.len());
    if let Some(index) = choice.prompts.as_ref().and_then(beyond) {
        let problem = format!(
            "names {index}; those of {} are 0 to {}",
            subject.name,
            prompts.len() - 1
        );
        return Err(ModelError::invalid("prompts", problem));
    }
    let wanted = |index: &usize| choice.prompts.as_ref().is_none_or(|wanted| wanted.contains(index));
    let unit = |index: usize| Unit {
        index,
        prompt: with_placeholder(&prompts[index], subject),
        text: with_class(&prompts[index], subject),
    };
    Ok((0..prompts.len()).filter(wanted).map(unit).collect())
}

/// A unit's random stream; its images are the stream's indices 0, 1, ... Independent of the other subjects and
/// prompts, the order, and the worker.
pub fn stream(seed: u64, subject: &Subject, unit: &Unit) -> u64 {
    let mut hash = Sha256::new();
    hash.update(b"coar dreambench");
    hash.update(seed.to_le_bytes());
    hash.update(subject.name.as_bytes());
    hash.update([0]);
    hash.update(unit.prompt.as_bytes());
    let digest: [u8; 32] = hash.finalize().into();
    u64::from_le_bytes(*digest.first_chunk().expect("a digest has 32 bytes"))
}

/// Parses `0,3,5-9` as numbers, sorted, without duplicates.
///
/// # Errors
/// When a part is neither a number nor a range.
pub fn numbers(text: &str) -> Result<Vec<usize>, String> {
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim) {
        let fault = || format!("has `{part}`; expected numbers and ranges, such as 0,3,5-9");
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| fault());
        match part.split_once('-') {
            None => all.push(number(part)?),
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from > to || to - from > 10_000 {
                    return Err(fault());
                }
                all.extend(from..=to);
            }
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(subjects: &[&str], prompts: &str) -> Result<Plan, ModelError> {
        let choice = Choice {
            subjects: (!subjects.is_empty()).then(|| subjects.iter().map(|name| (*name).to_owned()).collect()),
            prompts: (!prompts.is_empty()).then(|| numbers(prompts).unwrap()),
        };
        Plan::new(&Catalogue::of_dataset().unwrap(), &choice, 4)
    }

    #[test]
    fn full_plan_has_three_thousand_images() {
        let all = plan(&[], "").unwrap();
        assert_eq!((all.subjects.len(), all.total()), (30, 3000));
        let (dog, units) = &all.subjects[10];
        assert_eq!(
            (dog.name.as_str(), units[10].prompt.as_str()),
            ("dog", "a <dog> dog wearing a red hat")
        );
        let mut streams: Vec<u64> = all
            .subjects
            .iter()
            .flat_map(|(s, units)| units.iter().map(|u| stream(7, s, u)))
            .collect();
        streams.sort_unstable();
        streams.dedup();
        assert_eq!(streams.len(), 750);
    }

    #[test]
    fn partial_plan_is_a_subset_of_the_full_plan() {
        let (all, some) = (plan(&[], "").unwrap(), plan(&["cat2", "backpack_dog"], "24,3").unwrap());
        let names: Vec<&str> = some.subjects.iter().map(|(subject, _)| subject.name.as_str()).collect();
        assert_eq!(
            (names.as_slice(), some.total()),
            (["backpack_dog", "cat2"].as_slice(), 16)
        );
        let (dog, units) = &some.subjects[0];
        assert_eq!(dog, &all.subjects[1].0);
        assert_eq!(
            units.as_slice(),
            [all.subjects[1].1[3].clone(), all.subjects[1].1[24].clone()]
        );
        assert_eq!(
            stream(0, dog, &units[0]),
            stream(0, &all.subjects[1].0, &all.subjects[1].1[3])
        );
        assert_ne!(stream(0, dog, &units[0]), stream(1, dog, &units[0]));
    }

    #[test]
    fn unknown_subjects_and_prompts_are_named() {
        let fault = |result: Result<Plan, ModelError>| result.unwrap_err().to_string();
        assert!(fault(plan(&["dog", "dog4"], "")).starts_with("`subjects` names `dog4`; the subjects are backpack, "));
        assert_eq!(
            fault(plan(&["dog"], "25")),
            "`prompts` names 25; those of dog are 0 to 24"
        );
        let all = Catalogue::of_dataset().unwrap();
        assert!(fault(Plan::new(&all, &Choice::default(), 0)).contains("`pictures` is 0; expected 1 to 16"));
    }

    #[test]
    fn ranges_are_read() {
        assert_eq!(numbers("5-7, 0,6").unwrap(), [0, 5, 6, 7]);
        for bad in ["", "a", "3-", "4-2", "-1", "0-99999999"] {
            assert!(numbers(bad).unwrap_err().contains("expected numbers"), "{bad}");
        }
    }
}
