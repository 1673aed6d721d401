"""Spiking network architectures: functions that return modules."""
