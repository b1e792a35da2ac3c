"""Preferences, rewards and teachers through a composition: the study's plan, trainings, report."""
